"""A run that is killed and started again ends with the same bytes as an uninterrupted one."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import forks
import preempted
import pytest
from conftest import ONE_LAYER, SHORT, linked, run_program
from forks import run_processes

from pipeline.runs import artifacts, stopping
from pipeline.runs.metrics import read_metrics
from pipeline.training import callbacks

# The experts are large, so that writing them takes long enough to be interrupted.
LARGE = (
    "model.tiny.num_hidden_layers=4",
    "model.tiny.num_local_experts=16",
    "model.tiny.hidden_size=512",
    "model.tiny.intermediate_size=512",
)


def run_and_kill(when: Callable[[], bool], *arguments: str) -> None:
    """Start the program in a fork, and kill it with SIGKILL as soon as `when` is true. Return when it has ended."""
    process = subprocess.Popen(
        [*forks.interpreter(), "-m", "pipeline", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=forks.ROOT,
    )
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, "the program ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # the output ends when the fork ends, which has it too


def test_sft_killed_between_checkpoints_resumes_to_the_same_weights(smoke_run: Path, tmp_path: Path, capsys) -> None:
    arguments = ("recipe=smoke", *SHORT, "sft.save_steps=4", "sft.eval_steps=4", "sft.max_steps=20")
    whole, killed = (f"run_dir={linked(tmp_path / name, smoke_run, 'upcast')}" for name in ("whole", "killed"))
    assert run_program("stage=sft", whole, *arguments) == 0

    sft = tmp_path / "killed" / "sft"
    run_and_kill(lambda: any(sft.glob("checkpoints/checkpoint-*/whole")), "stage=sft", killed, *arguments)
    assert not (sft / artifacts.ARTIFACT_FILE).exists()
    capsys.readouterr()
    assert run_program("stage=qat", killed, *arguments) == 2
    assert "needs" in capsys.readouterr().err

    assert run_program("stage=sft", killed, *arguments) == 0
    assert "resuming from step" in capsys.readouterr().out
    one, other = artifacts.load(tmp_path / "whole" / "sft"), artifacts.load(sft)
    assert one.fingerprint == other.fingerprint
    assert one.details == other.details
    losses = [
        [line["loss"] for line in read_metrics(directory) if "loss" in line]
        for directory in (one.directory, other.directory)
    ]
    assert losses[0] == losses[1]


def make_interruption(step: int) -> Callable[..., None]:
    """Make an `on_save` for `Checkpoints` that interrupts the run as soon as the checkpoint of `step` is complete."""
    on_save = callbacks.Checkpoints.on_save

    def interrupt(self, args, state, control, **event) -> None:
        on_save(self, args, state, control, **event)
        if state.global_step == step:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize(("recipe", "stage"), [("smoke", "qat"), ("smoke_lora", "sft"), ("smoke_lora", "qat")])
def test_training_interrupted_after_a_checkpoint_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, stage: str, request: pytest.FixtureRequest
) -> None:
    made = request.getfixturevalue("smoke_run" if recipe == "smoke" else "lora_run")
    run = Path(shutil.copytree(made, tmp_path / "run"))
    layers = ONE_LAYER if recipe == "smoke_lora" else ()
    every_four = [f"{stage}.{key}=4" for key in ("save_steps", "eval_steps")]
    arguments = (f"stage={stage}", f"recipe={recipe}", f"run_dir={run}", *SHORT, *layers, *every_four, "overwrite=true")
    assert run_program(*arguments) == 0
    whole = artifacts.load(run / stage)
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(4))
        assert run_program(*arguments) == 130
    assert not (run / stage / artifacts.ARTIFACT_FILE).exists()
    assert run_program(*arguments[:-1]) == 0
    resumed = artifacts.load(run / stage)
    assert (resumed.fingerprint, resumed.details) == (whole.fingerprint, whole.details)


def test_sft_resumed_at_any_step_ends_like_an_uninterrupted_run(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 4
    every_step = [f"sft.{key}=1" for key in ("save_steps", "eval_steps", "logging_steps")]
    settings = ("stage=sft", "recipe=smoke", *SHORT, f"sft.max_steps={steps}", *every_step)

    def train(name: str) -> tuple[artifacts.Artifact, list[float]]:
        assert run_program(*settings, f"run_dir={tmp_path / name}") == 0
        directory = tmp_path / name / "sft"
        return artifacts.load(directory), [line["loss"] for line in read_metrics(directory) if "loss" in line]

    for name in ("whole", *map(str, range(1, steps))):
        linked(tmp_path / name, smoke_run, "upcast")
    whole, losses = train("whole")
    assert len(losses) == steps
    for step in range(1, steps):
        with monkeypatch.context() as patched:
            patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(step))
            assert run_program(*settings, f"run_dir={tmp_path / str(step)}") == 130
        resumed, resumed_losses = train(str(step))
        assert (resumed.fingerprint, resumed.details, resumed_losses) == (whole.fingerprint, whole.details, losses)


def test_sft_with_lost_lines_of_metrics_resumes_to_the_same_figures(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    settings = ("stage=sft", f"run_dir={linked(tmp_path, smoke_run, 'upcast')}", "recipe=smoke", *SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(6))
        assert run_program(*settings) == 130
    (tmp_path / "sft" / "metrics.jsonl").write_bytes(b"")
    assert run_program(*settings) == 0
    shown = capsys.readouterr()
    assert "resuming from step 6" in shown.out
    assert "metrics.jsonl: lines up to step 6 are missing or damaged. They are restored from" in shown.err
    whole, resumed = artifacts.load(smoke_run / "sft"), artifacts.load(tmp_path / "sft")
    assert (resumed.fingerprint, resumed.details) == (whole.fingerprint, whole.details)
    steps = [[line["step"] for line in read_metrics(each.directory)] for each in (whole, resumed)]
    assert steps[0] == steps[1]


@pytest.fixture
def heeded_signals() -> Iterator[None]:
    """Let signals stop the program in this process, as in a process of its own."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    stopping.heed_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded_signals")
def test_training_that_the_system_stops_saves_a_checkpoint_and_resumes_to_the_same_result(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def send(self, args, state, control, **_) -> None:
        if state.global_step == 2:  # in the middle of step 3; lines of metrics follow steps 2 and 4
            os.kill(os.getpid(), signal.SIGUSR1)

    run = linked(tmp_path, smoke_run, "upcast")
    settings = (f"run_dir={run}", "recipe=smoke", *SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Metrics, "on_pre_optimizer_step", send, raising=False)
        assert run_program("stage=sft", *settings) == 143
    shown = capsys.readouterr()
    assert "[sft] SIGUSR1: stopping after this step, with a checkpoint\n" in shown.out
    assert shown.err.endswith(
        "error: stopped by SIGUSR1 after step 3, with a checkpoint. stage=sft: the next run starts from step 3, its"
        f" last checkpoint. To go on: python -m pipeline stage=sft run_dir={run}\n"
    )
    assert run_program("stage=sft", *settings) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    whole, resumed = artifacts.load(smoke_run / "sft"), artifacts.load(run / "sft")
    assert (resumed.fingerprint, resumed.details) == (whole.fingerprint, whole.details)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step() -> None:
    ended = run_processes(preempted.__file__)
    assert ended.returncode == 0, ended.stdout
    for rank in range(2):
        assert f"process {rank}: stopped by SIGUSR1 after step 3, with a checkpoint" in ended.stdout


def test_an_incomplete_checkpoint_is_removed_and_not_resumed_from(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    arguments = ("stage=sft", f"run_dir={linked(tmp_path, smoke_run, 'upcast')}", "recipe=smoke", *SHORT)
    sft = tmp_path / "sft"
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(6))
        assert run_program(*arguments) == 130
    incomplete = sft / "checkpoints" / "checkpoint-9"
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"half of it")
    assert run_program(*arguments) == 0
    output = capsys.readouterr().out
    assert "removing checkpoint-9" in output
    assert "resuming from step 6" in output


def test_export_killed_between_shards_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    arguments = ("recipe=smoke", *LARGE, "export.source=upcast", "export.shard_bytes=1000000")
    whole, killed = (f"run_dir={tmp_path / name}" for name in ("whole", "killed"))
    assert run_program("stage=upcast", whole, *arguments) == 0
    linked(tmp_path / "killed", tmp_path / "whole", "source", "upcast")
    assert run_program("stage=export", whole, *arguments) == 0

    export = tmp_path / "killed" / "export" / "mxfp4"
    run_and_kill(lambda: len(list(export.glob("*.safetensors"))) >= 2, "stage=export", killed, *arguments)
    assert not (export / artifacts.ARTIFACT_FILE).exists()
    finished = {path: path.stat().st_mtime_ns for path in export.glob("*.safetensors")}

    assert run_program("stage=export", killed, *arguments) == 0
    assert len(finished) < len(list(export.glob("*.safetensors")))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert artifacts.load(tmp_path / "whole" / "export").fingerprint == artifacts.load(export).fingerprint
