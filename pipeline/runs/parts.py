"""Results of one stage side by side. `export/<target>/` holds one export, and `export/` shows one of them by links.

The directory `export/<target>` is a part of the stage. The links in `export/` are relative and lead to the files of the
part that was asked for last. The link to artifact.json is made last and removed first, so a kill never leaves a
directory that looks complete and is not. `verify` and `publish` have the same parts.

Older versions wrote into `export/` itself. Such a result is read where it is. `settle` moves it to its part before the
stage is built again. A copy of a run may hold files in the place of links, because `scp -r` follows links. Such copies
count as links.
"""

import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config import Stage
from pipeline.errors import UserError
from pipeline.runs.artifacts import (
    ARTIFACT_FILE,
    CHECKPOINTS_DIR,
    SHARDS_FILE,
    UNFINISHED_FILE,
    advise_rebuild,
)
from pipeline.runs.console import say, warn
from pipeline.runs.durable import sync

STAGES = (Stage.export.name, Stage.verify.name, Stage.publish.name)
"""Names of the stages with parts."""
CHECKPOINT = "checkpoint"
"""Part of `verify` for a checkpoint that is no export of this run (verify.checkpoint)."""

_REPORT = "report.json"
_MARKS = (ARTIFACT_FILE, UNFINISHED_FILE)
_NOT_SHOWN = {UNFINISHED_FILE, CHECKPOINTS_DIR, SHARDS_FILE}


def find(place: Path, name: str) -> Path:
    """Return the directory of a part, which need not exist. `place` is the directory of the stage."""
    return place if _is_older(place) and _older_name(place) in (name, None) else place / name


def complete(place: Path) -> dict[str, Path]:
    """Find the complete parts of a stage: name -> directory, in the order of the names."""
    found = {path.parent.name: path.parent for path in place.glob(f"*/{ARTIFACT_FILE}")}
    if _is_older(place) and (place / ARTIFACT_FILE).is_file():
        found[_older_name(place) or place.name] = place
    return dict(sorted(found.items()))


def find_unfinished(place: Path) -> dict[str, Path]:
    """Find the parts of a stage that have begun and are not complete: name -> directory, in the order of the names."""
    there = (path.parent for path in sorted(place.glob(f"*/{UNFINISHED_FILE}")))
    return {path.name: path for path in there if not (path / ARTIFACT_FILE).is_file()}


def newest(place: Path) -> str | None:
    """Return the name of the part that the stage's directory shows. Without links, return the part that is youngest.

    The result is None if no part is complete.
    """
    there = complete(place)
    name = find_shown(place)
    if name in there:
        return name
    return max(there, key=lambda each: (there[each] / ARTIFACT_FILE).stat().st_mtime_ns, default=None)


def find_shown(place: Path) -> str | None:
    """Return the name of the complete part that the stage's directory shows, or None if it shows none."""
    file = place / ARTIFACT_FILE
    if file.is_symlink():
        return _part_of(file)
    if not file.is_file():
        return None
    return _older_name(place) if _is_older(place) else _copied_name(place)


def show(part: Path) -> None:
    """Let the stage's directory show a part. If that is impossible, print a warning with the reason.

    It is impossible on a file system without symbolic links, and if a link would replace a file of somebody else.
    """
    place = part.parent
    wanted = {path.name for path in part.iterdir() if path.name not in _NOT_SHOWN and path.suffix != ".tmp"}
    if {name for name, target in _links(place) if target == part.name} == wanted:
        return
    try:
        hide(place)
        for name in sorted(wanted, key=lambda name: name == ARTIFACT_FILE):
            if name == ARTIFACT_FILE:
                sync(place)
            (place / name).symlink_to(f"{part.name}/{name}")
        sync(place)
    except OSError as error:
        _forget(place)
        file = error.filename2 or error.filename
        warn(place.name, f"{place} cannot show {part} by links ({file}: {error.strerror}). Use {part}.")


def resolve(directory: Path) -> Path:
    """Return the directory of the part that a stage's directory shows. Return any other directory as it is.

    If a file in the place of a link has other bytes than the part's, the directory shows no part but itself.
    """
    name = None if _is_older(directory) else find_shown(directory)
    return directory if name is None or _altered(directory, name) else directory / name


def restore_links(place: Path) -> None:
    """Replace files in the place of links by links. A copy of the run holds such files.

    Raises:
        UserError: one of these files is no copy, because it has other bytes.
    """
    name = None if _is_older(place) else find_shown(place)
    if name is None:
        return
    part = place / name
    if others := _altered(place, name):
        raise UserError(
            f"{place / others[0]}: differs from {part / others[0]}, although both belong to the same export. Delete the"
            f" former if it is wrong. Otherwise, the export is wrong. {advise_rebuild(part)}"
        )
    if any(True for _ in _copies(place, name)):
        say(place.name, f"{place} holds copies of files in {part}. They are replaced by links.")
        show(part)


def _altered(place: Path, name: str) -> list[str]:
    """Return the names of the files in the place of links to a part that have other bytes than the part's files."""
    return [file for file, is_same in _copies(place, name) if not is_same]


def hide(place: Path, name: str | None = None) -> None:
    """Remove the links to a part, or all links to parts. The link to artifact.json goes first."""
    there = [file for file, target in _links(place) if name in (None, target)]
    seen = None if _is_older(place) else find_shown(place)
    if seen is not None and name in (None, seen):
        there += [file for file, is_same in _copies(place, seen) if is_same]
    for file in sorted(there, key=lambda file: file != ARTIFACT_FILE):
        (place / file).unlink()
        if file == ARTIFACT_FILE:
            sync(place)


def settle(place: Path, name: str) -> None:
    """Move a result of an older version from the stage's directory to its part, before part `name` is built.

    If the part of the result is unknown, because it was being deleted, it becomes part `name`.

    Raises:
        UserError: the directory is a link, or the part exists already.
    """
    moving = place.with_name(f".{place.name}.moving")  # what an interrupted move leaves behind
    source = moving if moving.is_dir() else place if _is_older(place) else None
    if source is None:
        return
    part = place / (_older_name(source) or name)
    if place.is_symlink() or part.exists():
        raise UserError(
            f"{source}: holds a result of an older version, which belongs into {part}. It cannot be moved there,"
            f" because {place if place.is_symlink() else part} {'is a link' if place.is_symlink() else 'exists'}. Move"
            " the files yourself, or set another run_dir."
        )
    if source == place:
        place.rename(moving)
    place.mkdir(exist_ok=True)
    moving.rename(part)
    say(place.name, f"moved the result of an older version to {part}")
    if (part / ARTIFACT_FILE).is_file():
        show(part)


def has_foreign_files(place: Path) -> bool:
    """Whether the stage's directory has files, but neither a part nor a link to one."""
    if not place.is_dir() or _is_older(place) or any(True for _ in _links(place)):
        return False
    if any((path / mark).is_file() for path in place.iterdir() for mark in _MARKS):
        return False
    return any(not path.is_dir() for path in place.iterdir())


def _is_older(place: Path) -> bool:
    """Whether an older version wrote its result into the stage's directory itself."""
    files = [place / mark for mark in _MARKS]
    return any(file.is_file() and not file.is_symlink() for file in files) and _copied_name(place) is None


def _older_name(place: Path) -> str | None:
    """Return the part that a result of an older version belongs to, or None if its files do not say so."""
    record = _read(place / ARTIFACT_FILE) or _read(place / UNFINISHED_FILE)
    settings = record.get("settings", {})
    if settings.get("verify.checkpoint") is not None:
        return CHECKPOINT
    target = record.get("details", {}).get("target") or settings.get("export.target")
    return target or _read(place / _REPORT).get("target")


def _copied_name(place: Path) -> str | None:
    """Return the part whose files were copied into the stage's directory, because a copy of the run followed links."""
    file = place / ARTIFACT_FILE
    if file.is_symlink() or not file.is_file():
        return None
    text = file.read_bytes()
    same = (path.parent.name for path in place.glob(f"*/{ARTIFACT_FILE}") if path.read_bytes() == text)
    return next(same, None)


def _copies(place: Path, name: str) -> Iterator[tuple[str, bool]]:
    """Yield the files that are in the stage's directory and in a part, and whether their bytes are the same."""
    for path in sorted((place / name).iterdir()):
        file = place / path.name
        if file.is_file() and not file.is_symlink():
            yield path.name, filecmp.cmp(file, path, shallow=False)


def _links(place: Path) -> Iterator[tuple[str, str]]:
    """Yield the links of a stage's directory to parts, as (name of the file, name of the part)."""
    for path in place.iterdir() if place.is_dir() else ():
        if path.is_symlink() and (name := _part_of(path)) is not None:
            yield path.name, name


def _part_of(link: Path) -> str | None:
    """Return the part that a link leads to, or None if `show` did not make the link."""
    target = Path(os.readlink(link))
    is_ours = not target.is_absolute() and len(target.parts) == 2 and target.name == link.name
    return target.parts[0] if is_ours and target.parts[0] != os.pardir else None


def _forget(place: Path) -> None:
    """Remove links that are left after a failure. Links that cannot be removed lack the one to artifact.json."""
    try:
        hide(place)
    except OSError as error:
        warn(place.name, f"{place}: links could not be removed ({error.strerror})")


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
