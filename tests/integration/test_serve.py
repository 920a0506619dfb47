"""stage=serve with a fake engine: the output, the message for each fault, and the end of the engine's processes."""

import functools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_engine
import forks
import psutil
import pytest
from conftest import run_program
from exports import make_export, prove

from pipeline.config import ModelConfig, PipelineConfig, Stage
from pipeline.serve import process

FAULTS = {
    "crash": "vllm ended before it was up, with exit status 1. The end of its log,",
    "never": "vllm was not up after serve.startup_seconds=1. The end of its log,",
    "hang": "vllm was up, but did not answer: ",
    "error": "/v1/chat/completions: status 500: ",
    "rubbish": "not what OpenAI's API promises (JSONDecodeError",
    "other": "not what OpenAI's API promises (KeyError('choices')): {\"answer\": 19}",
    "crash_when_asked": "vllm was up, but did not answer: ",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose export has passed `verify`."""
    directory = tmp_path_factory.mktemp("served") / "run"
    config = PipelineConfig(stage=Stage.export, run_dir=str(directory), model=ModelConfig("base"))
    prove(config, make_export(config))
    return directory


@pytest.fixture
def arguments(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that make the program serve with the fake engine, which records its process ids."""
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {fake_engine.__file__} "$@"\n')
    program.chmod(stat.S_IRWXU)
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    monkeypatch.delenv("FAKE_ENGINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = (f"run_dir={run_dir}", f"serve.program={program}", f"serve.port={port}")
    return ["stage=serve", "recipe=smoke", *settings]


def processes(tmp_path: Path) -> list[psutil.Process]:
    """Return which of these still run: the engine, its child, and the child that left the engine's process group."""
    left = []
    for pid in (tmp_path / "pids").read_text().split():
        if psutil.pid_exists(int(pid)) and (each := psutil.Process(int(pid))).status() != psutil.STATUS_ZOMBIE:
            left.append(each)
    return left


def test_it_shows_the_answer_by_channel_and_ends_the_engine(
    arguments: list[str], run_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_program(*arguments, "serve.once=true", "serve.question='Was ist 12 + 7?'") == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[1:] == [
        "[serve] question: Was ist 12 + 7?",
        "[serve] analysis: 12 + 7 = 19",
        "[serve] final: 19",
        "[serve] vllm has ended",
    ]
    assert processes(tmp_path) == []
    port = arguments[-1].partition("=")[2]
    log = (run_dir / "serve" / f"engine-{port}.log").read_text()
    (asked,) = (json.loads(line.removeprefix("asked ")) for line in log.splitlines() if line.startswith("asked "))
    assert asked["messages"][-1]["content"] == "Was ist 12 + 7?" and asked["reasoning_effort"] == "medium"
    assert "dated 2025-08-05\n" in log


def test_it_leaves_the_command_and_no_result(arguments: list[str], run_dir: Path) -> None:
    assert run_program(*arguments, "serve.once=true") == 0
    port = arguments[-1].partition("=")[2]
    script = (run_dir / "serve" / f"command-{port}.sh").read_text()
    assert script.startswith("#!/bin/sh\nexec env VLLM_SYSTEM_START_DATE=2025-08-05 ") and f"--port {port} " in script
    assert not (run_dir / "serve" / "artifact.json").exists()


def test_an_engine_that_takes_its_time_is_waited_for(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "late")
    started = time.monotonic()
    assert run_program(*arguments, "serve.once=true") == 0
    assert time.monotonic() - started > fake_engine.LATE_SECONDS


def test_channels_that_the_engine_left_in_the_text_are_taken_apart(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "raw")
    assert run_program(*arguments, "serve.once=true") == 0
    shown = capfd.readouterr().out
    assert "analysis: 12 + 7 = 19\n[serve] final: nineteen\n" in shown and "<|" not in shown


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_engine_ends_with_1_and_the_end_of_its_log(
    arguments: list[str],
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", fault)
    settings = ("serve.startup_seconds=1", "serve.answer_seconds=1") if fault in ("never", "hang") else ()
    assert run_program(*arguments, *settings, "serve.once=true") == 1
    error = capfd.readouterr().err
    assert FAULTS[fault] in error and "Traceback" not in error
    assert "shard 39" in error and "shard 2\n" not in error
    assert ("out of memory" in error) == (fault == "crash")
    assert processes(tmp_path) == []


def test_a_program_that_is_none_is_a_mistake(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vllm").write_text("neither a script nor a program")
    assert run_program(*arguments) == 2
    assert f"{tmp_path / 'vllm'} cannot be started (Exec format error)" in capfd.readouterr().err


def test_an_engine_that_ends_by_itself_while_it_serves_ends_with_1(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "crash_later")
    assert run_program(*arguments) == 1
    assert "vllm ended while it served, with exit status 5." in capfd.readouterr().err


def test_an_engine_that_ignores_being_asked_to_end_is_killed(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "stubborn")
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3)
    assert run_program(*arguments, "serve.once=true") == 0
    assert "did not end within 0.3 s" in capfd.readouterr().out
    assert processes(tmp_path) == []


@contextmanager
def started(arguments: list[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Start the program in a fork, and end this fork even if the test fails.

    SIGINT gets its default handler. Otherwise the program would ignore SIGINT if pytest is a background job of a shell.
    """
    command, root = [*forks.interpreter(), "-m", "pipeline", *arguments], forks.ROOT
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, text=True, cwd=root, preexec_fn=heed, **how) as program:
        try:
            yield program
        finally:
            program.terminate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ending_the_program_ends_the_engine_and_all_its_children(
    arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    with started(arguments, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        shown = []
        for line in program.stdout:
            shown.append(line)
            if "Ctrl-C ends it" in line:
                assert len(processes(tmp_path)) == 3
                program.send_signal(number)
        assert program.wait(20) == 0
    assert shown[-2:] == ["[serve] ending the engine\n", "[serve] vllm has ended\n"]
    assert processes(tmp_path) == []


def test_ending_the_program_before_the_engine_is_up_is_an_interruption(arguments: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "FAKE_ENGINE": "never"}
    with started(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as program:
        while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 3:
            assert program.poll() is None
            time.sleep(0.05)
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) == 130
    assert processes(tmp_path) == []
