"""Helpers for tests of README and docs: read the fenced blocks of a page, and run them in a copy of the checkout."""

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import dropwhile
from pathlib import Path

import forks

ROOT = Path(__file__).parents[1]
EXTENDING = ROOT / "docs" / "extending.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"^```(?P<language>\w*) *(?:\{(?P<marks>[^}]*)\})?[^\n]*\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
_PROGRAM = re.compile(
    r"(?:^|\s)(?:python -m pipeline|accelerate launch .*?-m pipeline|gpt-oss-qat|scripts/launch)(?=\s|$)"
)
_LENGTH = re.compile(r"((?:max_samples|max_steps|eval_steps|save_steps)(?:: |=))(\d+)")
_SECTION = re.compile(r"^## (.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: file that contains the block.
        line: number of its first line.
        language: such as bash.
        marks: such as .needs-gpu.
        text: without the fences.
    """

    page: Path
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Read the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, match.start()) + 2,
            match["language"] or ("bash" if ".bash" in (match["marks"] or "") else ""),
            tuple(mark for mark in (match["marks"] or "").split() if mark != ".bash"),
            match["text"],
        )
        for match in _BLOCK.finditer(text)
    ]


def read_sections(page: Path) -> dict[str, list[Block]]:
    """Map the heading of each section to its blocks."""
    text = page.read_text(encoding="utf-8")
    starts = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in _SECTION.finditer(text)]
    blocks = read_blocks(page)
    ends = [line for line, _ in starts[1:]] + [text.count("\n") + 1]
    return {
        title: [block for block in blocks if start < block.line <= end]
        for (start, title), end in zip(starts, ends, strict=True)
    }


def program_arguments(block: Block) -> Iterator[list[str]]:
    """Search a block for commands that start the program. Yield the arguments of each command."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = re.split(r"\s(?:\||&&|>)\s", line)[0]
        if (found := _PROGRAM.search(command)) is not None and not line.lstrip().startswith("#"):
            arguments = shlex.split(command[found.end() :], comments=True)
            yield list(dropwhile(_is_flag_of_launcher, arguments))


def _is_flag_of_launcher(argument: str) -> bool:
    return "=" not in argument and argument not in ("-m", "--help", "--version")


def copy_checkout(into: Path) -> Path:
    """Copy the checkout into a new directory, and return the directory. Its environment needs no installation."""
    into.mkdir()
    for name in ("conf", "docs", "pipeline", "recipes", "scripts"):
        shutil.copytree(ROOT / name, into / name)
    shutil.copy(ROOT / "pyproject.toml", into)
    _shorten(into / "recipes" / "smoke.yaml")
    _shorten_demo(into / "recipes" / "demo.yaml")
    (into / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (into / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    shutil.copy(into / "pyproject.toml", into / ".venv" / ".installed")
    return into


def use_forks(checkout: Path) -> None:
    """Let the environment of a copied checkout run the program in forks, also after `source .venv/bin/activate`."""
    programs = checkout / ".venv" / "bin"
    activate = (programs / "activate").read_text(encoding="utf-8")
    programs.unlink()
    programs.mkdir()
    (programs / "activate").write_text(activate.replace(sys.prefix, str(checkout / ".venv")), encoding="utf-8")
    for script in _directory_of_python(checkout).iterdir():
        (programs / script.name).symlink_to(script)


def _shorten(recipe: Path) -> None:
    """Divide steps and samples of a recipe by ten. The tests run some forty commands with it, and judge no losses."""
    shorter, count = _divide_lengths(recipe.read_text(encoding="utf-8"))
    assert count == 7, "max_samples, and three settings of each training stage"
    recipe.write_text(shorter, encoding="utf-8")


def _divide_lengths(text: str) -> tuple[str, int]:
    """Divide steps and samples by ten. Return the new text, and how many numbers it has."""
    return _LENGTH.subn(lambda found: f"{found[1]}{max(1, int(found[2]) // 10)}", text)


def _shorten_demo(recipe: Path) -> None:
    """Leave the controls out of the demonstration, and use less data. test_demo.py judges what it teaches."""
    text = recipe.read_text(encoding="utf-8")
    for before, after in (
        ("controls: true", "controls: false"),
        ("max_samples: 900", "max_samples: 96"),
        ("max_samples: 200", "max_samples: 16"),
        ("evaluate:\n", "evaluate:\n  max_samples: 24\n"),
    ):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    recipe.write_text(text, encoding="utf-8")


@cache
def _directory_of_python(program: Path | None) -> Path:
    """Make a directory with the scripts `python` and `gpt-oss-qat`. They run the program in a fork.

    The program is that of the checkout `program`. If it is None, it is that of the directory of each command.
    `python` runs all else in a new interpreter. torchrun starts its processes with it too, and gives it the flag -u
    first.
    """
    directory = Path(tempfile.mkdtemp(prefix="python-of-pages-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    script = directory / "python"
    interpreter = shlex.join(forks.interpreter() if program is None else forks.interpreter_of(program))
    new = shlex.quote(sys.executable)
    script.write_text(
        f'#!/bin/sh\n[ "$1" = -u ] && shift\n[ "$1 $2" = "-m pipeline" ] && exec {interpreter} "$@"\nexec {new} "$@"\n'
    )
    command = directory / "gpt-oss-qat"
    command.write_text(f'#!/bin/sh\nexec {interpreter} -m pipeline "$@"\n')
    for each in (script, command):
        each.chmod(0o755)
    return directory


def run_block(block: Block, directory: Path, program: Path | None = None) -> str:
    """Run a block in a directory, and return what it prints. Steps that a command sets are as short as the recipe's.

    Args:
        block: the block.
        directory: the directory. It is a checkout, unless `program` is given.
        program: a checkout that does not change any more. The commands run its program.
    """
    forking = _directory_of_python(program)
    path = os.pathsep.join([str(forking), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _divide_lengths(block.text)[0]],
        cwd=directory,
        env={**os.environ, "PATH": path, "PYTHON_EXEC": str(forking / "python")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{block}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
