"""scripts/launch: the command for each set of flags, and the processes that the command starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


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
        f"python3 {REPOSITORY / 'scripts' / 'torchrun'} --nproc-per-node=4 --standalone --max-restarts=0"
        r" --signals-to-handle=SIGTERM\,SIGINT\,SIGHUP\,SIGQUIT\,SIGUSR1 --shutdown-timeout=600",
        "pipeline stage=sft data.path=my\\ file \n",
    ]


def test_the_processes_do_not_import_from_the_working_directory(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$PYTHONSAFEPATH $PYTHONPATH"\n')
    interpreter.chmod(0o755)
    outcome = launch("--processes", "1", "stage=sft", PYTHON=str(interpreter), PYTHONPATH="/wheels")
    assert outcome.stdout == f"1 {REPOSITORY}:/wheels\n"


@pytest.mark.parametrize(("slurm", "name"), [({}, ""), ({"SLURM_NNODES": "2", "SLURM_JOB_ID": "1"}, "srun ")])
def test_the_processes_know_the_command_that_hints_name(tmp_path: Path, slurm: dict[str, str], name: str) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "$GPT_OSS_QAT_LAUNCHER"\n')
    interpreter.chmod(0o755)
    environment = {"PYTHON": str(interpreter), "MASTER_ADDR": "node1", **slurm}
    outcome = launch("--processes", "2", "stage=sft", **environment)
    assert outcome.stdout == f"{name}{REPOSITORY}/scripts/launch --processes 2\n"


def test_only_the_same_command_of_a_slurm_step_has_the_same_launch_and_never_in_a_shell(tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\necho "${GPT_OSS_QAT_LAUNCH-none}"\n')
    interpreter.chmod(0o755)

    def name(*arguments: str, **more: str) -> str:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", **more}
        return launch("--processes", "1", *arguments, PYTHON=str(interpreter), **slurm).stdout.strip()

    first = name("stage=sft", "overwrite=true")
    assert first.startswith("slurm-7.0-")
    assert name("stage=sft", "overwrite=true", SLURM_RESTART_COUNT="1") == first
    others = [name("stage=qat", "overwrite=true"), name("stage=sft", "overwrite=true", SLURM_STEP_ID="1")]
    assert len({first, *others}) == 3
    assert name("stage=sft", "overwrite=true", SLURM_PTY_PORT="33333") == "none"
    assert name("stage=sft", "overwrite=true", SLURM_STEP_ID="4294967290") == "none"


def test_under_slurm_the_launcher_meets_at_the_first_node_and_restarts() -> None:
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "123456", "MASTER_ADDR": "node1"}
    outcome = launch("--processes", "8", "--dry-run", "stage=sft", **slurm)
    for flag in ("--nnodes=2", "--rdzv-endpoint=node1:23456", "--rdzv-id=123456", "--max-restarts=3"):
        assert f" {flag} " in outcome.stdout


@pytest.mark.parametrize(
    ("visible", "processes"), [(None, 3), ("0", 1), ("2,0", 2), ("GPU-1a,GPU-2b", 2), ("0,-1,1", 1)]
)
def test_the_launcher_starts_one_process_per_visible_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, processes: int
) -> None:
    listing = "".join(
        f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})\\n  MIG 1g.10gb Device 0: (UUID: MIG-{i})\\n" for i in range(3)
    )
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    outcome = launch("--dry-run", "stage=sft", PATH=f"{tmp_path}:{os.environ['PATH']}", **chosen)
    assert f" --nproc-per-node={processes} " in outcome.stdout


def test_the_launcher_needs_a_number_of_processes_if_no_gpu_is_visible() -> None:
    outcome = launch("--dry-run", "stage=sft", CUDA_VISIBLE_DEVICES="")
    assert outcome.returncode == 2 and "--processes N" in outcome.stderr


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


def test_the_launcher_starts_two_processes_that_leave_with_one_message(tmp_path: Path) -> None:
    outcome = launch("--processes", "2", "stage=sft", "recipe=smoke", f"run_dir={tmp_path}", PYTHON=sys.executable)
    assert outcome.returncode == 2
    lines = [line for line in outcome.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith("error: stage=sft needs")
    assert not (tmp_path / "sft").exists()


def test_a_killed_process_is_named_with_its_signal(tmp_path: Path) -> None:
    """The children run a program that kills itself, in place of the pipeline."""
    program = tmp_path / "pipeline.py"
    program.write_text("import os, signal\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    script = REPOSITORY / "scripts" / "torchrun"
    outcome = subprocess.run(
        [sys.executable, script, "--standalone", "--nproc-per-node=2", program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert outcome.returncode == 128 + 9
    assert outcome.stderr.splitlines()[-1].startswith("error: process 1 was killed by SIGKILL")
    assert "Traceback" not in outcome.stderr
