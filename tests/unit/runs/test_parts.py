"""Exports side by side: their directories, the links that show one of them, older runs, copied runs and kills."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest
from exports import EXPORTED, make_export, prove, record_of

from pipeline.config import ExportConfig, ExportTarget, ModelConfig, PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.runs import artifacts, building, exports, parts
from pipeline.runs.artifacts import Kind, Result
from pipeline.runs.run import Run


def config_of(directory: Path, target: str | None = "mxfp4", overwrite: bool = False) -> PipelineConfig:
    export = ExportConfig(target=None if target is None else ExportTarget[target])
    return PipelineConfig(
        stage=Stage.export, run_dir=str(directory), export=export, model=ModelConfig("base"), overwrite=overwrite
    )


def make(directory: Path, target: str, text: str = "weights", overwrite: bool = False) -> artifacts.Artifact:
    """Make an export with one weight file in the layout `target`. mxfp4 also has a config.json."""
    files = {**EXPORTED, "model.safetensors": text} if target == "mxfp4" else {f"model.{target}": text}
    return make_export(config_of(directory, target, overwrite), target, files)


def make_older(directory: Path, target: str = "mxfp4") -> Path:
    """Make an export as older versions did: its files are in `export/` itself. Return this directory."""
    make(directory, target)
    parts.hide(directory / "export")
    part, place = (directory / "export" / target).rename(directory / "moved"), directory / "export"
    place.rmdir()
    part.rename(place)
    return place


def contents(place: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in place.iterdir() if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_second_target_is_made_beside_the_first_and_is_shown(run: Path) -> None:
    first = make(run, "mxfp4")
    before = contents(first.directory)
    second = make(run, "gguf")
    assert first.directory == run / "export" / "mxfp4" and second.directory == run / "export" / "gguf"
    assert contents(first.directory) == before
    assert contents(run / "export") == contents(second.directory)
    assert artifacts.load(run / "export").fingerprint == second.fingerprint


def test_an_export_that_is_up_to_date_is_shown_again(run: Path) -> None:
    first = make(run, "mxfp4")
    make(run, "gguf")
    make(run, "mxfp4")
    assert contents(run / "export") == contents(first.directory)


def test_the_links_are_relative_so_that_a_moved_run_shows_its_own_files(run: Path, tmp_path: Path) -> None:
    make(run, "mxfp4")
    moved = run.rename(tmp_path / "moved")
    assert {os.readlink(path) for path in (moved / "export").iterdir() if path.is_symlink()} == {
        f"mxfp4/{name}" for name in (*EXPORTED, "artifact.json", "config.yaml")
    }
    assert artifacts.load(moved / "export").files.keys() == EXPORTED.keys()


def test_the_fingerprint_of_the_shown_directory_leaves_the_other_exports_out(run: Path) -> None:
    make(run, "mxfp4")
    second = make(run, "gguf")
    assert artifacts.fingerprint_of(run / "export") == (second.fingerprint, second.files, {"model.gguf": ANY})


def test_overwrite_rebuilds_only_the_target_that_was_asked_for(run: Path) -> None:
    make(run, "mxfp4")
    other = make(run, "gguf")
    inode = (other.directory / "model.gguf").stat().st_ino
    again = make(run, "mxfp4", "other weights", overwrite=True)
    assert (other.directory / "model.gguf").stat().st_ino == inode
    assert artifacts.load(run / "export").fingerprint == again.fingerprint


@pytest.mark.parametrize("target", ["mxfp4", "gguf"])
def test_a_kill_while_an_export_is_built_never_leaves_mixed_files(run: Path, target: str) -> None:
    """mxfp4 is shown. A killed rebuild of it leaves nothing that looks complete. A killed gguf leaves it as it was."""
    shown = make(run, "mxfp4")
    here = Run(config_of(run, target, overwrite=True))

    def die(directory: Path) -> Result:
        (directory / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        building.build(here, Stage.export, settings=(), parents={"model": "n"}, work=die)
    if target == "mxfp4":
        assert not (run / "export" / "artifact.json").exists()
        assert not any(path.is_symlink() for path in (run / "export").iterdir())
    else:
        assert artifacts.load(run / "export").fingerprint == shown.fingerprint


@pytest.mark.parametrize("links", range(7))
def test_a_kill_between_two_links_leaves_a_directory_that_does_not_look_complete(
    run: Path, links: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(run, "mxfp4")
    second = make(run, "gguf")
    left = links

    def die_after(link: Path, *_: object, **__: object) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    real_link, real_unlink = Path.symlink_to, Path.unlink
    monkeypatch.setattr(Path, "symlink_to", lambda *a, **k: (die_after(*a), real_link(*a, **k)))
    monkeypatch.setattr(Path, "unlink", lambda *a, **k: (die_after(*a), real_unlink(*a, **k)))
    with pytest.raises(KeyboardInterrupt):
        parts.show(run / "export" / "mxfp4")
    monkeypatch.undo()
    assert links == 0 or not (run / "export" / "artifact.json").exists()
    parts.show(second.directory)
    assert contents(run / "export") == contents(second.directory)


def test_without_symbolic_links_one_line_says_where_the_export_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(link: Path, *_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported", str(link))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    export = make(run, "mxfp4")
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot show" in line and "Operation not supported" in line and line.endswith(f"Use {export.directory}.")
    assert [path.name for path in (run / "export").iterdir()] == ["mxfp4"]
    assert exports.require(Run(config_of(run, None))).directory == export.directory


def test_a_file_of_the_user_is_never_replaced_by_a_link(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run, "gguf")
    (run / "export" / "config.json").write_text("mine")
    make(run, "mxfp4")
    assert f"({run / 'export' / 'config.json'}: File exists)" in capsys.readouterr().err
    assert (run / "export" / "config.json").read_text() == "mine"
    assert not (run / "export" / "artifact.json").exists()


def test_an_export_of_an_older_version_is_used_where_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = make_older(run)
    before = contents(place)
    assert make(run, "mxfp4").directory == place
    assert exports.require(Run(config_of(run, None))).directory == place
    assert "up to date" in capsys.readouterr().out and contents(place) == before


def test_another_target_moves_the_export_of_an_older_version_and_keeps_its_bytes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(make_older(run))
    make(run, "gguf")
    assert f"moved the result of an older version to {run / 'export' / 'mxfp4'}" in capsys.readouterr().out
    assert contents(run / "export" / "mxfp4") == before
    assert parts.complete(run / "export").keys() == {"gguf", "mxfp4"}


def test_a_move_that_was_interrupted_is_finished_later(run: Path) -> None:
    place = make_older(run)
    before = contents(place)
    place.rename(run / ".export.moving")
    make(run, "gguf")
    assert contents(run / "export" / "mxfp4") == before and not (run / ".export.moving").exists()


def test_an_older_export_that_is_unfinished_is_resumed_in_its_part(run: Path) -> None:
    place = make_older(run)
    (place / "artifact.json").unlink()
    unfinished = {"settings": {"export.target": "mxfp4"}, "parents": {"model": "m", "source": "s"}, "data": None}
    (place / "unfinished.json").write_text(json.dumps(unfinished))
    make(run, "gguf")
    assert (run / "export" / "mxfp4" / "model.safetensors").read_text() == "weights"
    assert parts.complete(run / "export").keys() == {"gguf"}


def test_an_older_export_and_a_part_of_the_same_target_are_never_mixed(run: Path) -> None:
    place = make_older(run)
    shutil.copytree(place, place / "mxfp4")
    (place / "mxfp4" / "artifact.json").write_text((place / "artifact.json").read_text() + "\n")
    with pytest.raises(UserError, match="holds a result of an older version, which belongs into"):
        make(run, "gguf")
    assert (place / "model.safetensors").read_text() == "weights"


def test_a_copy_of_a_run_that_followed_the_links_gets_them_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run, "gguf")
    make(run, "mxfp4")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert exports.require(Run(config_of(copy, None))).directory == copy / "export" / "mxfp4"
    assert "They are replaced by links." in capsys.readouterr().out
    assert (copy / "export" / "model.safetensors").is_symlink()
    make(copy, "gguf")
    assert contents(copy / "export") == contents(copy / "export" / "gguf")


def test_a_copy_with_other_bytes_is_named_and_not_deleted(run: Path, tmp_path: Path) -> None:
    make(run, "mxfp4")
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "export" / "model.safetensors").write_text("Weights")
    with pytest.raises(UserError, match=r"export/model.safetensors: differs from"):
        exports.require(Run(config_of(copy, None)))
    assert (copy / "export" / "model.safetensors").read_text() == "Weights"


def test_files_of_somebody_else_in_the_directory_are_refused(run: Path) -> None:
    (run / "export").mkdir(parents=True)
    (run / "export" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that this program did not write"):
        make(run, "mxfp4")


def test_a_linked_directory_of_another_run_is_not_changed(run: Path, tmp_path: Path) -> None:
    make(run, "mxfp4")
    before = contents(run / "export")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "export").symlink_to(run / "export")
    config = config_of(tmp_path / "other", "gguf")
    here = Run(config)
    with pytest.raises(UserError, match="is a symbolic link"):
        building.build(
            here, Stage.export, settings=(), parents={}, work=lambda _: Result(Kind.foreign, record_of("gguf"))
        )
    assert contents(run / "export") == before and not (run / "export" / "gguf").exists()


def test_export_means_the_last_one_unless_a_target_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(run, "mxfp4")
    make(run, "gguf")
    assert exports.require(Run(config_of(run, None))).directory.name == "gguf"
    assert f"takes {run / 'export' / 'gguf'}; export.target chooses another: mxfp4" in capsys.readouterr().out
    assert exports.require(Run(config_of(run, "mxfp4"))).directory.name == "mxfp4"
    assert "takes" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"export/openai, which is missing\. Run first: .* export.target=openai"):
        exports.require(Run(config_of(run, "openai")))


def test_each_export_keeps_its_own_proof(run: Path) -> None:
    first = make(run, "mxfp4")
    proof = prove(config_of(run, "mxfp4"), first)
    second = make(run, "gguf")
    here = Run(config_of(run, None))
    assert exports.find_proof(here, first) == proof and exports.find_proof(here, second) is None
    assert exports.missing_proof(here, second).endswith(f"run_dir={run} export.target=gguf")
    prove(config_of(run, "gguf"), second)
    assert [(each.target, each.proof is not None) for each in exports.find_all(run)] == [
        ("mxfp4", True),
        ("gguf", True),
    ]
    assert artifacts.load(run / "verify").parents["checkpoint"] == second.fingerprint


def test_reports_call_the_first_target_export_whatever_was_made_last(run: Path) -> None:
    make(run, "mxfp4")
    make(run, "bf16")
    assert {name: each.target for name, each in exports.by_name(run).items()} == {
        "export": "mxfp4",
        "export/bf16": "bf16",
    }
