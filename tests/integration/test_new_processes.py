"""A new process starts fast, imports only what it needs, and takes settings that libraries read while they start."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import forks
import psutil
import pytest
from forks import ROOT

from pipeline.models.attention import FUSED_SINKS

DATA = "data.path=synthetic://arithmetic"
OPTION = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""The option of PyTorch's allocator that the program sets."""
NAMES_OF_OPTIONS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process that finds the program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def printed(code: str, **environment: str) -> str:
    """Run code in a new process, and return the output."""
    done = python("-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def seconds_of_children() -> float:
    """Return the processor time of all child processes that have ended. Other load does not change it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("arguments", "status", "start"),
    [
        (["--help"], 0, "usage: python -m pipeline"),
        (["--help", "sft"], 0, "stage=sft"),
        (["--version"], 0, "gpt-oss-qat "),
        (["--shell-completion", "query=recipe=smok"], 0, "recipe=smoke\t"),
        ([], 2, "gpt-oss-qat fine-tunes"),
        (["stage=sft", "sft.lr=1"], 2, "error: sft.lr=1: unknown key"),
        (
            ["stage=sft", "data.path=synthetic://arithmetic", "sft.learning_rate=0"],
            2,
            "error: sft.learning_rate=0.0: must be",
        ),
    ],
)
def test_help_and_mistakes_answer_within_two_seconds_and_import_nothing_slow(
    arguments: list[str], status: int, start: str
) -> None:
    before = seconds_of_children()
    done = python("-X", "importtime", "-m", "pipeline", *arguments)
    assert seconds_of_children() - before < 2
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [done.stdout, *(line for line in lines if not line.startswith("import time:"))]
    needs_hydra = any("=" in argument for argument in arguments) and "--shell-completion" not in arguments
    assert (done.returncode, "".join(said)[: len(start)]) == (status, start)
    assert ("hydra" in imported) == needs_hydra
    assert imported & {"torch", "transformers", "trl", "peft", "modelopt", "datasets", "accelerate"} == set()


def test_a_stage_says_within_a_second_that_it_loads_pytorch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "stage=upcast", "recipe=smoke", f"run_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        used = psutil.Process(running.pid).cpu_times()  # other load does not change it
        running.kill()
    assert line == "[upcast] loading PyTorch and other libraries, which takes a few seconds\n"
    assert used.user + used.system < 1


def test_importing_the_package_and_run_loads_neither_torch_nor_hydra() -> None:
    code = "import sys, pipeline; from pipeline import run, UserError; print({'torch', 'hydra'} & {*sys.modules})"
    assert printed(code) == "set()"


def test_sizes_of_tensors_are_known_without_torch() -> None:
    code = "import sys; from pipeline.checkpoints.gpt_oss import TensorInfo; print(TensorInfo('BF16', (3,)).bytes)"
    assert printed(f"{code}; assert 'torch' not in sys.modules") == "6"


def test_the_program_sets_options_of_the_allocator_before_torch_is_loaded() -> None:
    assert printed("import sys, pipeline.__main__; print('torch' in sys.modules)") == "False"


def test_torch_accepts_the_options_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES_OF_OPTIONS:
        monkeypatch.delenv(name, raising=False)
    done = python("-W", "error", "-c", "import torch; print(torch.zeros(2).sum())", **OPTION)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_row_of_a_csv_file_is_named_also_on_several_cores(tmp_path: Path) -> None:
    """The library reads the number of cores while it is imported."""
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\nonly\n")
    code = "import sys; from pathlib import Path; from pipeline.data.files import read_file;"
    code += f" print([row[1] for row in read_file(Path({str(tmp_path / 'rows.csv')!r}), 'train')][1].reason)"
    assert printed(code, OMP_NUM_THREADS="4").startswith("has 1 cells, but the header has 2.")


def test_a_new_process_builds_a_model_with_fused_attention(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "build.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nimport torch\nfrom pipeline.models import streaming\n"
        "model = streaming.build(Path(sys.argv[1]), torch.bfloat16, attn_implementation=sys.argv[2])\n"
        "print(model.config._attn_implementation)\n"
    )
    command = [*forks.interpreter(), str(script), str(tiny), FUSED_SINKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=forks.environment())
    assert done.stdout.split() == [FUSED_SINKS], done.stderr
