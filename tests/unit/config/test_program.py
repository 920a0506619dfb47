"""Hints name the command that the user typed, and files that hide the program are found."""

import sys
from pathlib import Path

import pytest
from conftest import run_program

import pipeline
from pipeline.config import help, program
from pipeline.config.composition import FOLDERS


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("/home/me/.venv/bin/gpt-oss-qat", "gpt-oss-qat"),
        ("gpt-oss-qat", "gpt-oss-qat"),
        ("/site-packages/pipeline/__main__.py", "python -m pipeline"),
        ("train.py", "python -m pipeline"),
    ],
)
def test_the_name_is_that_of_the_command_that_was_typed(monkeypatch: pytest.MonkeyPatch, typed: str, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [typed])
    assert program.name() == name
    assert program.name_program("Use python -m pipeline --help.") == f"Use {name} --help."


def test_columns_stay_aligned_behind_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpt-oss-qat"])
    for line in ("  python -m pipeline --help                ", "  README.md, docs/index.md                 "):
        assert program.name_program(line + "all").index("all") == len(line)
    pages = [program.name_program(help.START), program.name_program(help.whole(FOLDERS))]
    columns = [[line.rindex("  ") for line in page.splitlines() if line.startswith("  gpt-oss-qat ")] for page in pages]
    assert columns[0][-3:] == [columns[0][-1]] * 3 and len({*columns[1]}) == 1


def test_under_the_launcher_hints_name_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPT_OSS_QAT_LAUNCHER", "scripts/launch --processes 2")
    assert run_program("stage=sft", "recipe=smoke", f"run_dir={tmp_path}") == 2
    assert f"Run first: scripts/launch --processes 2 stage=upcast recipe=smoke run_dir={tmp_path}" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["pipeline.py", "pipeline/__init__.py"])
def test_a_file_that_hides_the_program_is_found_and_named_in_a_warning(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    monkeypatch.chdir(tmp_path)
    assert program.find_hiding_file(tmp_path) == file
    assert run_program("stage=sft", "recipe=smoke", f"run_dir={tmp_path}/run") == 2
    assert f"[gpt-oss-qat] warning: {file} hides this program from `python -m pipeline`" in capsys.readouterr().err


def test_neither_the_program_itself_nor_a_plain_folder_hides_it(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    assert program.find_hiding_file(tmp_path) is None
    assert program.find_hiding_file(Path(str(pipeline.__file__)).parents[1]) is None
