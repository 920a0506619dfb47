"""Two processes that share one model: they train it as one process does, and leave what one process leaves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHORT, run_program
from test_processes import REPOSITORY, launched, losses, two_processes

from pipeline import artifacts

BATCH = ("sft.batch_size=4", "qat.batch_size=4", "sft.max_steps=8", "sft.eval_steps=4", "sft.save_steps=4")
TWICE = ("sft.gradient_accumulation_steps=2", "qat.gradient_accumulation_steps=2")
FSDP2 = "sharding=fsdp2"

PROGRAM = """
import sys
from pathlib import Path
from torch.distributed.tensor import DTensor
from pipeline import __main__ as program, models, training
{patch}
sys.argv = ["pipeline", *sys.argv[1:]]
sys.exit(program.status(sys.argv[1:]))
"""

INTERRUPTED = """
from pipeline import callbacks
on_save = callbacks.Checkpoints.on_save
def interrupt(self, *arguments, **more):
    on_save(self, *arguments, **more)
    raise KeyboardInterrupt
callbacks.Checkpoints.on_save = interrupt
"""

COMPARED = """
from pipeline.tracking import is_main_process
save = models.save
def compared(model, ref, directory, train, config):
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert any(p.to_local().numel() < p.numel() for p in model.parameters())
    result = save(model, ref, directory, train, config)
    state = {name: p.full_tensor() for name, p in model.named_parameters()}
    if is_main_process():
        whole = models.load_plain(ref.base, models.TRAIN_DTYPES[train.precision])
        whole.load_state_dict(state)
        other = Path(config.run_dir) / "other"
        other.mkdir()
        assert save(whole, ref, other, train, config) == result
        names = sorted(path.name for path in other.glob("*.safetensors"))
        assert names and all((other / name).read_bytes() == (directory / name).read_bytes() for name in names)
    print("compared")
    return result
models.save = compared
"""


def program(tmp_path: Path, patch: str) -> str:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(patch=patch))
    return str(script)


@pytest.mark.parametrize("recipe", ["smoke", "smoke_lora"])
def test_fsdp2_trains_as_one_process_and_proves_the_export(tmp_path: Path, recipe: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ("stage=all", f"recipe={recipe}", *SHORT, *BATCH)
    assert run_program(*arguments, *TWICE, f"run_dir={one}") == 0
    outcome = two_processes(*arguments, f"run_dir={two}", FSDP2)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for stage in ("sft", "qat"):
        assert losses(two, stage) == pytest.approx(losses(one, stage), rel=1e-5)
        files = [artifacts.load(run / stage).files for run in (one, two)]
        assert files[0].keys() == files[1].keys()
    assert artifacts.load(two / "verify").details["checks"] == artifacts.load(one / "verify").details["checks"]


def test_what_sharded_processes_save_is_what_one_process_saves(tmp_path: Path) -> None:
    arguments = (f"run_dir={tmp_path / 'run'}", "recipe=smoke", *SHORT, "sft.max_steps=2")
    assert run_program("stage=upcast", *arguments) == 0
    outcome = launched(program(tmp_path, COMPARED), "stage=sft", *arguments, FSDP2, "upcast.shard_bytes=300000")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.count("compared") == 2
    assert len(list((tmp_path / "run" / "sft").glob("*.safetensors"))) > 1


def test_weights_cast_to_bf16_for_the_forward_pass_are_saved_as_such(tmp_path: Path) -> None:
    precision = ("sft.precision=mixed_bf16", "qat.precision=mixed_bf16", "sft.max_steps=2", "qat.max_steps=2")
    outcome = two_processes("stage=all", "recipe=smoke", *SHORT, *precision, f"run_dir={tmp_path}", FSDP2)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for stage in ("sft", "qat"):
        assert artifacts.load(tmp_path / stage).details["dtype"] == "bfloat16"


def test_sharded_training_resumes_to_the_same_losses_and_only_on_as_many_processes(tmp_path: Path, capsys) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = ("recipe=smoke", *SHORT, *BATCH)
    for directory in (run, whole):
        assert run_program("stage=upcast", f"run_dir={directory}", *arguments) == 0
    assert two_processes("stage=sft", f"run_dir={whole}", *arguments, FSDP2).returncode == 0
    outcome = launched(program(tmp_path, INTERRUPTED), "stage=sft", f"run_dir={run}", *arguments, FSDP2)
    assert "exitcode  : 130" in outcome.stderr
    checkpoint = run / "sft" / "checkpoints" / "checkpoint-4"
    assert not list(checkpoint.glob("*.safetensors"))
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2

    capsys.readouterr()
    assert run_program("stage=sft", f"run_dir={run}", *arguments) == 2
    assert "checkpoint-4 is of 2 processes with sharding=fsdp2; on 1 with sharding=none" in capsys.readouterr().err

    outcome = two_processes("stage=sft", f"run_dir={run}", *arguments, FSDP2)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "going on from step 4" in outcome.stdout
    assert losses(run, "sft") == losses(whole, "sft")
    assert artifacts.load(run / "sft").fingerprint == artifacts.load(whole / "sft").fingerprint


def test_one_process_has_nothing_to_share(tmp_path: Path, capsys) -> None:
    arguments = (f"run_dir={tmp_path}", "recipe=smoke")
    assert run_program("stage=upcast", *arguments) == 0
    capsys.readouterr()
    assert run_program("stage=sft", *arguments, FSDP2) == 2
    assert "error: sharding=fsdp2: there is one process, and nothing to share among." in capsys.readouterr().err


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [REPOSITORY / "scripts" / "launch", *arguments],
        env={**os.environ, "PYTHON": "python3", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_launcher_prints_a_command_for_one_machine() -> None:
    outcome = launch("--processes", "4", "--dry-run", "stage=sft", "data.path=my file")
    assert outcome.stdout.split(" -m ") == [
        "python3",
        "torch.distributed.run --nproc-per-node=4 --standalone --max-restarts=0",
        "pipeline stage=sft data.path=my\\ file \n",
    ]


def test_under_slurm_the_launcher_meets_at_the_first_node_and_restarts() -> None:
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "123456", "MASTER_ADDR": "node1"}
    outcome = launch("--processes", "8", "--dry-run", "stage=sft", **slurm)
    for flag in ("--nnodes=2", "--rdzv-endpoint=node1:23456", "--rdzv-id=123456", "--max-restarts=3"):
        assert f" {flag} " in outcome.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--processes", "0", "stage=sft"), "--processes 0: must be a whole number"),
        (("--gpus", "2"), "--gpus: unknown flag"),
        (("--dry-run",), "nothing to run"),
    ],
)
def test_the_launcher_says_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    outcome = launch(*arguments)
    assert outcome.returncode == 2
    assert message in outcome.stderr


def test_the_launcher_runs_two_processes(tmp_path: Path) -> None:
    arguments = (f"run_dir={tmp_path}", "recipe=smoke", *SHORT, "sft.max_steps=2")
    assert run_program("stage=upcast", *arguments) == 0
    outcome = launch("--processes", "2", "stage=sft", *arguments, FSDP2, PYTHON=sys.executable)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert artifacts.load(tmp_path / "sft").stage == "sft"
