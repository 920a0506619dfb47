"""A job of a sweep uses the models of `base_run` that have its settings, from any working directory."""

from pathlib import Path

import pytest
from evaluated import record

from pipeline.config import BlendPartConfig, DataConfig, ModelConfig, PipelineConfig, SftConfig, Stage
from pipeline.config.overrides import listed_value
from pipeline.runs import own_settings
from pipeline.runs.own_settings import OwnSettings
from pipeline.runs.run import START, Run
from pipeline.runs.settings import plain


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


# --- the parts of a blend ---------------------------------------------------------------------------------------------


BLEND = [("a.jsonl", 3.0), ("parts", 1.0)]


@pytest.fixture
def blended(base: Path, tmp_path: Path) -> Path:
    """The run of `base`, whose data are a blend of a file and a folder in `first/`. `second/` has such names, too."""
    for name in ("first", "second"):
        (tmp_path / name / "a.jsonl").touch()
        (tmp_path / name / "parts").mkdir()
    parts = [plain(BlendPartConfig(path=path, weight=weight)) for path, weight in BLEND]
    record(base / "sft", settings={"data.path": None, "data.blend": parts, "model.path": "gpt", "sft.start": None})
    given = "data.blend=[{path: a.jsonl, weight: 3.0}, {path: parts, weight: 1.0}]"
    own_settings.write(base, OwnSettings({"data.blend": given}, str(tmp_path / "first")))
    return base


def blend_of_job(base: Path, model: Path, *paths: Path | str, weight: float = 3.0) -> Path:
    parts = [BlendPartConfig(path=str(path), weight=each) for path, each in zip(paths, (weight, 1.0), strict=True)]
    config = PipelineConfig(
        Stage.qat,
        run_dir=str(base / "sweep" / "job"),
        base_run=str(base),
        data=DataConfig(blend=parts),
        model=ModelConfig(str(model)),
    )
    return Run(config).stage_dir(Stage.sft)


def test_the_paths_of_a_blend_count_by_their_place_and_not_by_their_spelling(blended: Path, tmp_path: Path) -> None:
    first, gpt = tmp_path / "first", tmp_path / "first" / "gpt"
    (tmp_path / "link").symlink_to(first)
    same = {
        first / "a.jsonl": first / "parts",
        "../first/a.jsonl": "../first/parts/",
        f"{tmp_path}/link/a.jsonl": f"{tmp_path}/link/parts",
    }
    for file, folder in same.items():
        assert blend_of_job(blended, gpt, file, folder) == blended / "sft"
    other = blended / "sweep" / "job" / "sft"
    assert blend_of_job(blended, gpt, "a.jsonl", "parts") == other  # those in second/
    assert blend_of_job(blended, gpt, first / "parts", first / "a.jsonl") == other
    assert blend_of_job(blended, gpt, first / "a.jsonl", first / "parts", weight=2.0) == other


def test_the_same_text_in_another_directory_is_another_place(base: Path, tmp_path: Path) -> None:
    own = base / "sweep" / "job" / "sft"
    assert sft_of_job(base, "chats.jsonl", tmp_path / "first" / "gpt") == own
    assert sft_of_job(base, f"{tmp_path}/first/../first/chats.jsonl", f"{tmp_path}/first/gpt/") == base / "sft"


def test_recorded_paths_of_a_blend_become_absolute_in_another_directory(blended: Path, tmp_path: Path) -> None:
    own, first = own_settings.read(blended), tmp_path / "first"
    assert own is not None and own.moved == ("data.blend",)
    (override,) = own.overrides.values()
    paths = [part["path"] for part in listed_value(override) or []]
    assert paths == [f"{first}/a.jsonl", f"{first}/parts"]
