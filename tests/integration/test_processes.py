"""Two processes train like one process with the same global batch. The processes use gloo on the CPU."""

import os
import subprocess
from pathlib import Path

import forks
import pytest
from conftest import SHORT, run_program

from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node={}", "--no-python")


OWN_TORCHRUN = (str(REPOSITORY / "scripts" / "torchrun"), *TORCHRUN[1:])


def launch(*command: str, processes: int = 2, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess:
    """Run a Python command under a launcher. The launcher and the processes that it starts are forks (`forks`).

    Args:
        command: script or module, with its arguments.
        processes: number of processes.
        launcher: module or script of the launcher, and its flags. {} stands for the number of processes. The last flag
            lets the launcher start any command.
    """
    python = forks.interpreter()
    module = [] if "/" in launcher[0] else ["-m"]
    started = [*python, *module, *(part.format(processes) for part in launcher), *python, *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(started, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


def losses(run_dir: Path, stage: str) -> list[float]:
    lines = read_metrics(run_dir / stage)
    return [line[key] for line in lines for key in ("loss", "eval_loss") if key in line]


def token_counts(run_dir: Path, stage: str) -> list[tuple[int, int]]:
    lines = read_metrics(run_dir / stage)
    return [(line["tokens"], line["supervised_tokens"]) for line in lines if "tokens" in line]


def test_two_processes_train_like_one_and_verify_the_export(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # The steps stay within one epoch, because accelerate fills the last batch of an epoch with repeated examples.
    within = ("sft.max_steps=8", "sft.eval_steps=4", "sft.save_steps=4")
    single = ("sft.gradient_accumulation_steps=2", "qat.gradient_accumulation_steps=2")
    arguments = ("recipe=smoke", *SHORT, *within, "sft.batch_size=4", "qat.batch_size=4")
    for stage in ("upcast", "sft", "quantize", "qat", "export", "verify"):
        assert run_program(f"stage={stage}", *arguments, *single, f"run_dir={one}") == 0
    outcome = launch("-m", "pipeline", "stage=all", *arguments, f"run_dir={two}")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.count("[sft] done") == 1
    for stage in ("sft", "qat"):
        assert losses(two, stage) == pytest.approx(losses(one, stage), rel=1e-5)
        assert token_counts(two, stage) == token_counts(one, stage)
    assert artifacts.load(two / "verify").details["checks"] == artifacts.load(one / "verify").details["checks"]


def test_processes_that_start_again_keep_the_stage_that_they_have_rebuilt(tmp_path: Path) -> None:
    script, run = tmp_path / "restarted.py", tmp_path / "run"
    script.write_text(
        "import os, sys\n"
        "from pipeline import __main__ as program\n"
        "sys.argv[0] = 'pipeline'\n"
        "status = program.status(sys.argv[1:])\n"
        "sys.exit(1 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else status)\n"
    )
    command = (str(script), "stage=upcast", "recipe=smoke", f"run_dir={run}", "overwrite=true")
    outcome = launch(*command, launcher=(*OWN_TORCHRUN[:-1], "--max-restarts=1", OWN_TORCHRUN[-1]))
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.count("[upcast] done") == 1
    assert outcome.stdout.count("has already rebuilt") == 1


def test_a_process_that_fails_alone_reports_its_error(tmp_path: Path) -> None:
    script = tmp_path / "lonely.py"
    script.write_text(
        "import os, sys, time\n"
        "from pipeline import __main__ as program\n"
        "from pipeline.config import rules\n"
        "from pipeline.errors import UserError\n"
        "def resolve(composed):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise UserError('this node has no such file')\n"
        "    time.sleep(250)\n"
        "rules.resolve = resolve\n"
        "program._SECONDS_FOR_THE_MAIN_PROCESS = 1\n"
        "sys.argv = ['pipeline', 'stage=sft', 'recipe=smoke']\n"
        "sys.exit(program.status(sys.argv[1:]))\n"
    )
    outcome = launch(str(script))
    assert "error on process 1: this node has no such file" in outcome.stderr
    assert "exitcode  : 2" in outcome.stderr


def test_all_processes_wait_for_the_main_process(tmp_path: Path) -> None:
    """The first barrier must work too, although accelerate makes no process group on CPUs by default."""
    script = tmp_path / "barrier.py"
    script.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from pipeline.runs.processes import is_main_process, wait_for_everyone\n"
        f"done = Path({str(tmp_path / 'done')!r})\n"
        "if is_main_process():\n"
        "    time.sleep(3)\n"
        "    done.touch()\n"
        "wait_for_everyone()\n"
        "assert done.exists()\n"
    )
    outcome = launch(str(script))
    assert outcome.returncode == 0, outcome.stderr[-2000:]
