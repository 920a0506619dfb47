"""Reading README and docs in tests: fenced blocks, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"^```(?P<language>\w*) *(?:\{(?P<marks>[^}]*)\})?[^\n]*\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
_PROGRAM = re.compile(
    r"(?:^|\s)(?:python -m pipeline|accelerate launch .*?-m pipeline|gpt-oss-qat|scripts/launch)(?=\s|$)"
)
_SECTION = re.compile(r"^## (.*)\n", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: file that it stands in.
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
    """Yield the arguments of each command in a block that starts the program."""
    for line in block.text.replace("\\\n", " ").splitlines():
        command = re.split(r"\s(?:\||&&|>)\s", line)[0]
        if (found := _PROGRAM.search(command)) is not None and not line.lstrip().startswith("#"):
            arguments = shlex.split(command[found.end() :], comments=True)
            yield list(dropwhile(_is_flag_of_launcher, arguments))


def _is_flag_of_launcher(argument: str) -> bool:
    return "=" not in argument and argument not in ("-m", "--help")
