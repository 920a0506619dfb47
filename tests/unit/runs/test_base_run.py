"""A job of a sweep uses the models of `base_run` that have its settings, from any working directory."""

from pathlib import Path

import pytest
from evaluated import record

from pipeline.config import DataConfig, ModelConfig, PipelineConfig, SftConfig, Stage
from pipeline.runs import own_settings
from pipeline.runs.own_settings import OwnSettings
from pipeline.runs.run import START, Run


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was made in `first/` from chats.jsonl and gpt/. The present command runs in `second/`."""
    for name in ("first", "second"):
        (tmp_path / name / "gpt").mkdir(parents=True)
        (tmp_path / name / "chats.jsonl").touch()
    base = tmp_path / "base"
    record(base / "sft", settings={"data.path": "chats.jsonl", "model.path": "gpt", "sft.start": None})
    overrides = {"data.path": "data.path=chats.jsonl", "model.path": "model.path=gpt"}
    own_settings.write(base, OwnSettings(overrides, str(tmp_path / "first")))
    monkeypatch.chdir(tmp_path / "second")
    return base


def sft_of_job(base: Path, data: Path | str, model: Path | str, start: str | None = None) -> Path:
    config = PipelineConfig(
        Stage.qat,
        run_dir=str(base / "sweep" / "job"),
        base_run=str(base),
        data=DataConfig(path=str(data)),
        model=ModelConfig(str(model)),
        sft=SftConfig(start=start),
    )
    return Run(config).stage_dir(Stage.sft)


def test_a_path_that_became_absolute_is_the_same_path(base: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert sft_of_job(base, first / "chats.jsonl", first / "gpt") == base / "sft"


def test_a_file_of_the_same_name_in_another_directory_is_another_file(base: Path, tmp_path: Path) -> None:
    first, second, own = tmp_path / "first", tmp_path / "second", base / "sweep" / "job" / "sft"
    assert sft_of_job(base, second / "chats.jsonl", first / "gpt") == own
    assert sft_of_job(base, first / "chats.jsonl", second / "gpt") == own
    assert sft_of_job(base, first / "missing.jsonl", first / "gpt") == own


def test_the_model_in_sft_start_counts_by_its_contents(base: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    record(first / "start", fingerprint="s")
    settings = {"data.path": "chats.jsonl", "model.path": "gpt", "sft.start": "start"}
    record(base / "sft", settings=settings, parents={START: "s"})
    assert sft_of_job(base, first / "chats.jsonl", first / "gpt", str(first / "start")) == base / "sft"
    record(first / "start", fingerprint="rebuilt")
    assert sft_of_job(base, first / "chats.jsonl", first / "gpt", str(first / "start")) != base / "sft"
