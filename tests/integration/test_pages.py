"""The commands in README and docs run or compose, and the examples of docs/extending.md work."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program
from pages import PAGES, ROOT, Block, program_arguments, read_blocks, read_sections

from pipeline import __main__ as program

EXTENDING = ROOT / "docs" / "extending.md"
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash" and block.page != EXTENDING]
MARKS = {".needs-gpu", ".needs-internet", ".needs-engine", ".needs-time", ".runs-tests"}
"""What keeps a block from running here: its commands are then only composed."""


def run_block(block: Block, directory: Path) -> str:
    """Run a block in a checkout, and return what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=directory,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{block}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout, with an environment that is ready."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("conf", "docs", "pipeline", "recipes", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / ".venv").mkdir()
    (copy / ".venv" / "bin").symlink_to(Path(sys.prefix) / "bin")
    shutil.copy(copy / "pyproject.toml", copy / ".venv" / ".installed")
    return copy


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The configurations that stages are called with. No stage runs."""
    monkeypatch.chdir(tmp_path)
    found: list[Any] = []
    monkeypatch.setattr(program, "_module", lambda stage: type("Recorder", (), {"run": staticmethod(found.append)}))
    return found


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_compose(block: Block, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert {*block.marks} <= MARKS
    for arguments in program_arguments(block):
        assert run_program(*arguments) == 0, f"{block}: {' '.join(arguments)}: {capsys.readouterr().err}"


def test_scripts_that_pages_name_exist() -> None:
    named = {word for block in SHELL for word in block.text.split() if word.startswith("scripts/")}
    assert "scripts/quickstart" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_readme_runs_from_top_to_bottom(checkout: Path) -> None:
    blocks = read_blocks(ROOT / "README.md")
    shown = "\n".join(block.text for block in blocks if block.language == "json")
    rows = [shown.replace("12", str(number)) for number in range(40)]
    (checkout / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    printed = "".join(run_block(block, checkout) for block in blocks if block.language == "bash" and not block.marks)
    assert (checkout / "runs" / "smoke" / "export" / "artifact.json").is_file()
    assert "[verify] ok " in printed and "[compare]" in printed


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / page.with_suffix(".html").name).is_file()


# --- extending -------------------------------------------------------------------------------------------------------


def apply(block: Block, checkout: Path) -> None:
    """Write the file that a block holds, or edit the one that it names."""
    first, _, rest = block.text.partition("\n")
    path = checkout / first.removeprefix("# ").strip()
    if block.language != "diff":
        path.write_text(block.text, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    place = -1
    for line in rest.splitlines():
        kind, text = line[:1], line[1:]
        if kind == "+":
            place += 1
            lines.insert(place, text)
        elif kind == "-":
            place = lines.index(text, place + 1)
            del lines[place]
            place -= 1
        else:
            place = lines.index(text, place + 1)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def follow(section: str, checkout: Path) -> str:
    """Do what a section of docs/extending.md says, and return what its commands print."""
    printed = ""
    for block in read_sections(EXTENDING)[section]:
        if block.language == "bash":
            printed += run_block(block, checkout)
        else:
            apply(block, checkout)
    return printed


def record(checkout: Path, stage: str) -> dict[str, Any]:
    return json.loads((checkout / "runs" / stage / "artifact.json").read_text(encoding="utf-8"))


@pytest.fixture
def extended(checkout: Path, smoke_run: Path) -> Iterator[Path]:
    """A copy of the checkout in which recipe=smoke has run."""
    shutil.copytree(smoke_run, checkout / "runs" / "smoke")
    yield checkout


def test_a_recipe_is_one_file(checkout: Path) -> None:
    follow("A recipe", checkout)
    assert record(checkout, "haiku/sft")["details"]["steps"] == 4
    assert record(checkout, "haiku/compare")["stage"] == "compare"


def test_a_data_set_is_one_file(checkout: Path) -> None:
    follow("A data set", checkout)
    assert record(checkout, "riddles/doctor")["details"]["data"]["rows"]["all"] == 20


def test_a_scorer_is_a_file_and_its_rows(extended: Path) -> None:
    assert '"brevity": ' in follow("A scorer", extended)
    assert record(extended, "smoke/evaluate")["details"]["results"]["export"]["brevity"] <= 1


def test_an_export_target_is_a_file_and_a_row(extended: Path) -> None:
    follow("An export target", extended)
    assert record(extended, "rowwise/export")["details"]["target"] == "rowwise"
    statuses = record(extended, "rowwise/verify")["details"]["checks"]
    assert [title for title, status in statuses.items() if title.startswith("experts") and status == "ok"]


def test_a_block_format_is_a_row_and_a_file(checkout: Path) -> None:
    follow("A block format", checkout)
    assert record(checkout, "nvfp4_32/qat")["fake_quantized"] == "nvfp4_32"
    assert record(checkout, "nvfp4_32/verify")["stage"] == "verify"


def test_an_engine_is_a_row(extended: Path) -> None:
    assert "lmdeploy serve api_server" in follow("An engine", extended)


def test_a_stage_is_a_file_and_its_rows(extended: Path) -> None:
    assert "[inventory] up to date" in follow("A stage", extended)
    assert record(extended, "smoke/inventory")["details"] == {"types": 2}
