"""The commands in README and docs run.

Some need a GPU, the internet or an engine. For these, the tests only compose the configuration.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program
from pages import EXTENDING, PAGES, ROOT, Block, copy_checkout, program_arguments, read_blocks, run_block, use_forks

README = ROOT / "README.md"
SHELL = [block for page in PAGES for block in read_blocks(page) if block.language == "bash" and page != EXTENDING]
MARKS = {f".needs-{what}" for what in ("gpu", "internet", "engine", "interruption", "time", "files")} | {".runs-tests"}
"""These tests do not run blocks that have one of these marks."""
RUNNING = [block for block in SHELL if not block.marks]
FOLLOWED = (README.name, "index.md")
"""Pages whose commands make the runs that other pages use."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A list that records the configuration of each call of a stage. No stage runs, and no model is looked up."""
    monkeypatch.chdir(tmp_path)
    found: list[Any] = []
    monkeypatch.setattr("pipeline.runs.job.run_stage", found.append)
    monkeypatch.setattr("pipeline.doctor.ahead.problems", lambda *_: [])
    return found


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkout in which the commands of README and of the first page have run, and the text that README's printed.

    README's first commands, those of the demonstration, run in new interpreters. All others run in forks.
    """
    checkout = copy_checkout(tmp_path_factory.mktemp("readme") / "checkout")
    shown = "\n".join(block.text for block in read_blocks(README) if block.language == "json")
    rows = [shown.replace("12", str(number)) for number in range(40)]
    (checkout / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    first, *others = [block for name in FOLLOWED for block in RUNNING if block.page.name == name]
    printed = run_block(first, checkout)
    use_forks(checkout)
    for block in others:
        output = run_block(block, checkout, checkout)
        printed += output if block.page == README else ""
    return checkout, printed


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_compose(block: Block, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert {*block.marks} <= MARKS
    for arguments in program_arguments(block):
        assert run_program(*arguments) == 0, f"{block}: {' '.join(arguments)}: {capsys.readouterr().err}"


def test_scripts_that_pages_name_exist() -> None:
    named = {word for block in SHELL for word in block.text.split() if word.startswith("scripts/")}
    assert "scripts/quickstart" in named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_readme_and_the_first_page_run_from_top_to_bottom(followed: tuple[Path, str]) -> None:
    checkout, printed = followed
    for run in ("demo", "try", "smoke"):
        assert (checkout / "runs" / run / "compare" / "artifact.json").is_file()
    assert "[verify] ok " in printed and "[compare]" in printed


@pytest.mark.parametrize("page", sorted({block.page.name for block in RUNNING} - {*FOLLOWED}))
def test_a_page_runs_from_top_to_bottom(page: str, followed: tuple[Path, str], tmp_path: Path) -> None:
    program, directory = followed[0], tmp_path / "checkout"
    shutil.copytree(program, directory, symlinks=True)
    shutil.rmtree(directory / "pipeline")  # the commands run that of the checkout
    for block in RUNNING:
        if block.page.name == page:
            run_block(block, directory, program)


def test_the_examples_of_the_library_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in read_blocks(ROOT / "docs" / "library.md"):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)
    assert names["verify"].details["checks"][
        "tensors: names, shapes and types fit the layout and the base model's sizes"
    ]
    assert (tmp_path / "packed" / "config.json").is_file() and (tmp_path / "plain" / "config.json").is_file()


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / page.with_suffix(".html").name).is_file()
