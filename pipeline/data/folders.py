"""Chooses the files of a folder that hold the rows of a split."""

import re
from pathlib import Path

from pipeline.config.hub_ids import DATA_SUFFIXES
from pipeline.data.files import KINDS, SPLIT_OF
from pipeline.errors import MOST_PROBLEMS, UserError, list_first, user_errors
from pipeline.runs.console import say, warn
from pipeline.runs.foreign_files import list_irregular

_TOGETHER = (".jsonl", ".parquet")  # files of these two formats are read together
_NO_ROWS = ("dataset_infos.json",)  # describes a data set on the Hub


def choose_files(key: str, folder: Path, split: str) -> list[Path]:
    """Return the files of a folder that hold the rows of a split, in the order of their names.

    A file belongs to the split that its name contains (`test.jsonl`, `chats-test.jsonl`). All other files belong to
    `train`. If no name contains a split, all files are used. Files that are not used are reported.

    Args:
        key: key of the data set's settings, for messages.
        folder: the folder.
        split: name of the split.

    Raises:
        UserError: the folder has no data files, data files of formats that cannot be mixed, or no file of the split.
            Or it has a named pipe or a broken link.
    """
    if irregular := list_irregular(folder):
        raise user_errors(irregular, most=MOST_PROBLEMS)
    present = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _NO_ROWS)
    known = [p for p in present if p.suffix.lower() in DATA_SUFFIXES]
    if not known:
        raise UserError(f"{key}.path={folder}: holds no data.{_advice(key, folder)}")
    chosen = [p for p in known if p.suffix.lower() in _TOGETHER] or known
    kinds = sorted({p.suffix.lower() for p in chosen} - {*_TOGETHER})
    if len(kinds) > 1:
        raise UserError(
            f"{key}.path={folder}: holds files of several formats ({_list(chosen)}). Give"
            f" one file, such as {key}.path={chosen[0]}, or move the other files away."
        )
    if others := [path for path in known if path not in chosen]:
        warn(
            "data",
            f"{key}.path={folder}: only the {' and '.join(_TOGETHER)} files are read, not {_list(others)}",
        )
    return _of_split(key, folder, split, chosen)


def _of_split(key: str, folder: Path, split: str, files: list[Path]) -> list[Path]:
    named = {path: found for path in files if (found := _split_in(path.stem)) is not None}
    if not named:
        return files
    wanted = SPLIT_OF.get(split, split)
    chosen = [path for path in files if named.get(path, "train") == wanted]
    if not chosen:
        splits = sorted({named.get(path, "train") for path in files})
        raise UserError(
            f"{key}.split={split}: {folder} has only {' and '.join(splits)}, by the names of its files. Set"
            f" {key}.split={splits[0]}, or give a file, such as {key}.path={files[0]}."
        )
    if others := [path for path in files if path not in chosen]:
        say(
            "data",
            f"{key}.split={split}: {_list(chosen)} of {folder}, and not {_list(others)}",
        )
    return chosen


def _split_in(name: str) -> str | None:
    """Return the split that a file name contains as a word, or None."""
    return next((SPLIT_OF[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLIT_OF), None)


def _advice(key: str, folder: Path) -> str:
    inner = [path for pattern in ("*/*", "*/*/*") for path in folder.glob(pattern)]
    below = sorted({path.parent for path in inner if path.suffix.lower() in DATA_SUFFIXES and path.is_file()})
    if below:
        return f" A folder in it does: {key}.path={below[0]}."
    return f" The path must be {KINDS}."


def _list(files: list[Path]) -> str:
    return list_first([path.name for path in files], most=5)
