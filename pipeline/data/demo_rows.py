"""The generated data sets of the demonstration, and their files.

A data set has three splits, which share no problem. Its rows are written to a `.jsonl` file, and read from there like
the rows of a user's file.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.data import alarming_questions, word_problems
from pipeline.runs.durable import write_text


@dataclass(frozen=True)
class Generated:
    """A generated data set.

    Attributes:
        rows: function that returns the first rows of a split. It takes the split and the number of rows.
        sizes: split -> number of its rows.
        modules: modules that make the rows. If their code changes, the rows may change.
    """

    rows: Callable[[str, int], list[dict[str, Any]]]
    sizes: dict[str, int]
    modules: tuple[ModuleType, ...]

    @property
    def code(self) -> list[Path]:
        """Files with the code that makes the rows."""
        return [Path(__file__), *(Path(str(module.__file__)) for module in self.modules)]


DATA_SETS = {
    "demo": Generated(word_problems.rows, {"train": 4000, "validation": 200, "test": 400}, (word_problems,)),
    "demo_refusal": Generated(
        alarming_questions.rows,
        {"train": 2400, "validation": 200, "test": 300},
        (alarming_questions, word_problems),
    ),
}
"""Name in data.path, after synthetic:// -> data set."""


def write(directory: Path, name: str, split: str) -> Path:
    """Write the rows of a split to a file in a directory, and return the file. The same call writes the same bytes."""
    made = DATA_SETS[name]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows(split, made.sizes[split])]
    path = directory / f"{name}-{split}.jsonl"
    write_text(path, "".join(lines))
    return path
