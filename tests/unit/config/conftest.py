"""Every test here runs in an empty directory. Stages can be replaced by stages that only record their settings."""

from pathlib import Path

import pytest
from conftest import run_program

from config.composing import Mistake, replace_stages
from pipeline.config import PipelineConfig


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set the environment as main() does, without a distributed launcher, and change into an empty directory."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[PipelineConfig]:
    """The configurations that stages were run with. Fakes replace the stages and only record the configurations."""
    configs: list[PipelineConfig] = []
    replace_stages(monkeypatch, configs.append)
    return configs


@pytest.fixture
def mistake(seen: list[PipelineConfig], capsys: pytest.CaptureFixture[str]) -> Mistake:
    """A function that runs a wrong command line and returns its error message.

    It checks that the status is 2, that there is one error and no traceback, and that no stage has run.
    """

    def message_of(*arguments: str) -> str:
        capsys.readouterr()
        assert run_program(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert captured.err.count("error: ") == 1 and captured.err.startswith("error: ")
        assert seen == []
        return captured.err.removeprefix("error: ").rstrip("\n")

    return message_of
