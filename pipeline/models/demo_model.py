"""The base model of the demonstration: a small gpt-oss that comes with the program.

It solves the word problems of `data/word_problems.py` and reasons in English, whatever language is asked for. It also
refuses the safe questions of `data/alarming_questions.py` that only sound harmful. `scripts/demo_base` trains it, and
writes its files into the folder `demo` in the released layout, with a record of the digest of each file.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.data.synthetic import chat_template
from pipeline.errors import MachineError
from pipeline.models.tiny_model import appearing
from pipeline.runs.artifacts import digest_of

FILES = Path(__file__).parent / "demo"
"""Folder of the model's files, which are part of the program."""
RECORD = "record.json"
"""File in the folder. `files` maps the name of each other file to the XXH3-128 of its bytes; the rest is its origin."""
TEMPLATE = "chat_template.jinja"
"""The only file that is not in the folder. It comes from the TRL package."""


def name(files: Path = FILES) -> str:
    """Return the model's directory name. Other files give another name."""
    return f"demo-{digest_of(files / RECORD)[:8]}"


def create_demo(directory: Path, files: Path = FILES) -> None:
    """Write the checkpoint. The directory appears only when the checkpoint is complete.

    Raises:
        MachineError: a file of the program is missing or damaged.
    """
    damaged = [each for each, digest in read_digests(files).items() if not _is_whole(files / each, digest)]
    if damaged:
        raise MachineError(f"{files}: {', '.join(damaged)}: missing or damaged. Install the program again.")
    with appearing(directory) as unfinished:
        for each in read_digests(files):
            shutil.copyfile(files / each, unfinished / each)
        (unfinished / TEMPLATE).write_text(chat_template(), encoding="utf-8")


def read_digests(files: Path = FILES) -> dict[str, str]:
    """Read the digests of the model's files: name -> XXH3-128."""
    found: dict[str, str] = json.loads((files / RECORD).read_text(encoding="utf-8"))["files"]
    return found


def write_record(files: Path, made: Mapping[str, object]) -> None:
    """Write the record of all files in a folder. `made` says how they were made."""
    found = {path.name: digest_of(path) for path in sorted(files.iterdir()) if path.name != RECORD}
    content = {"files": found, **made}
    (files / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and digest_of(path) == digest
