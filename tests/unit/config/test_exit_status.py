"""Exit statuses, and the messages that come with them."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch  # noqa: F401 - otherwise the program prints that it loads PyTorch
from conftest import run_program

from config.composing import replace_stages
from pipeline import __main__ as program
from pipeline.errors import CheckFailed, UserError
from pipeline.runs import present
from pipeline.runs.stopping import Stopped


def raising(error: BaseException) -> Callable[..., None]:
    def run(*_: object) -> None:
        raise error

    return run


ARGUMENTS = ("stage=sft", "recipe=smoke")


@pytest.mark.parametrize(("error", "status"), [(UserError("this is wrong."), 2), (CheckFailed("not equal."), 1)])
def test_a_mistake_and_a_failed_check_are_one_line_on_stderr(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stages(monkeypatch, raising(error))
    assert run_program(*ARGUMENTS) == status
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_a_bug_keeps_its_traceback_and_leaves_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stages(monkeypatch, raising(RuntimeError("an index is off")))
    assert run_program(*ARGUMENTS) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("RuntimeError: an index is off\n")


def test_an_interruption_leaves_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_stages(monkeypatch, raising(KeyboardInterrupt()))
    assert run_program(*ARGUMENTS) == 130
    assert capsys.readouterr().err == (
        "error: interrupted. To go on: python -m pipeline stage=sft recipe=smoke run_dir=runs/smoke\n"
    )


def test_another_process_waits_for_the_report_of_the_main_process_and_then_reports_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(program.time, "sleep", waited.append)
    replace_stages(monkeypatch, raising(UserError("this is wrong.")))
    assert run_program(*ARGUMENTS) == 2
    assert waited and min(waited) >= 5
    assert capsys.readouterr().err == "error on process 1: this is wrong.\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("this is wrong."), 2),
        (RuntimeError("Connection closed by peer"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("received", [Stopped(signal.SIGTERM), KeyboardInterrupt()], ids=repr)
def test_another_process_that_is_stopped_while_it_waits_leaves_without_a_word(
    error: BaseException,
    status: int,
    received: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The launcher stops all other processes as soon as the main process has reported its error and ended."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(present, "begin", raising(error))
    monkeypatch.setattr(program.time, "sleep", raising(received))
    assert program.status([*ARGUMENTS]) == status
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize(("processes", "is_named"), [("2", True), ("1", False)])
def test_the_end_of_another_process_is_named_without_a_traceback(
    processes: str, is_named: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        present, "begin", raising(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:36743"))
    )
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert program.status([*ARGUMENTS]) == 1
    error = capsys.readouterr().err
    assert ("error: the connection to another process was lost" in error) == is_named
    assert ("Traceback" in error) != is_named


def test_main_exits_with_the_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", "stage=sft", "sft.lr=1"])
    with pytest.raises(SystemExit) as leaving:
        program.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: sft.lr=1: unknown key")


@pytest.mark.parametrize(("arguments", "status"), [((), 2), (("--help",), 0), (("--version",), 0)])
def test_only_the_main_process_prints_the_start_screen_the_help_and_the_versions(
    arguments: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_program(*arguments) == status
        printed[rank] = "".join(capsys.readouterr())
    assert printed["0"] and not printed["1"]


@pytest.mark.parametrize("sweep", [(), ("-m", "sft.seed=1,2")])
def test_an_empty_run_dir_is_refused_and_nothing_is_written(
    sweep: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "command.yaml").write_text("the record of another run\n")
    monkeypatch.chdir(tmp_path)
    replace_stages(monkeypatch, raising(AssertionError("the stage has begun")))
    for recipe in ("recipe=smoke", "model=tiny"):
        assert run_program(*sweep, "stage=upcast", recipe, "run_dir=") == 2
        error = capsys.readouterr().err
        assert "error: run_dir: is empty" in error and "/sweep/" not in error
    assert [each.name for each in tmp_path.iterdir()] == ["command.yaml"]
