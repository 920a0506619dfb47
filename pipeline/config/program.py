"""The program's names on the command line, and files of the user that hide it."""

import os
import re
import sys
from pathlib import Path

COMMAND = "gpt-oss-qat"
MODULE = "python -m pipeline"
_LAUNCHER = "GPT_OSS_QAT_LAUNCHER"
"""Environment variable in which scripts/launch passes on the command that started it, quoted for a shell."""
_PACKAGE = Path(__file__).resolve().parents[1]


def name() -> str:
    """Return the command by which the user started the program, for hints: `COMMAND`, `MODULE` or scripts/launch.

    In a Python program, it is `MODULE`.
    """
    if launcher := os.environ.get(_LAUNCHER):
        return launcher
    return COMMAND if Path(sys.argv[0]).stem == COMMAND else MODULE


def name_program(text: str) -> str:
    """Replace the program's name in a text for people by the name that the user typed. Columns stay aligned."""
    command = name()

    def moved(line: re.Match[str]) -> str:
        gap = max(2, len(line[2]) + len(MODULE) - len(command))
        return line[1] + " " * gap

    aligned = re.sub(rf"(^ *{re.escape(MODULE)}\S*(?: \S+)*)( {{2,}})(?=\S)", moved, text, flags=re.MULTILINE)
    return aligned.replace(MODULE, command)


def find_hiding_file(directory: Path) -> Path | None:
    """Return the file that Python would import as `pipeline` in a working directory, unless it is this program.

    A folder without `__init__.py` hides nothing, because Python prefers packages that have one.
    """
    for file in (directory / "pipeline" / "__init__.py", directory / "pipeline.py"):
        if file.is_file():
            return None if file.parent.resolve() == _PACKAGE else file
    return None
