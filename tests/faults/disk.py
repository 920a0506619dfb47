"""The contents of a disk after a power cut, computed from the journal of the injector.

Nothing that was not synced is sure to be on the disk. File systems differ, and `names_kept` chooses between two ends:

- True: names reach the disk in order, as with a journal of metadata. The contents of files are lost since their last
  sync. So a file that was written, renamed and not synced is empty under its new name.
- False: a name is on the disk only if its directory was synced afterwards, which is all that POSIX promises.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class File:
    """A file: its contents that are on the disk, and the size to which it was cut since then."""

    synced: Path | None = None
    cut_to: int | None = None
    written: int = 0

    def content(self, names_kept: bool) -> bytes:
        """Return the bytes after a power cut."""
        content = self.synced.read_bytes() if self.synced is not None else b""
        return content[: self.cut_to] if names_kept else content


@dataclass
class Directory:
    """A directory: its entries, and the entries that are on the disk."""

    entries: dict[str, "Entry"] = field(default_factory=dict)
    synced: dict[str, "Entry"] = field(default_factory=dict)

    def at(self, path: str) -> "Entry":
        """Return the entry at a relative path."""
        here: Entry = self
        for name in filter(None, path.split("/")):
            if name != ".":
                assert isinstance(here, Directory), path
                here = here.entries[name]
        return here

    def parent(self, path: str) -> tuple["Directory", str]:
        """Return the directory of a path, and the path's last name."""
        before, _, name = path.rpartition("/")
        found = self.at(before)
        assert isinstance(found, Directory), path
        return found, name


Entry = File | Directory | str
"""An entry of a directory. A text is the target of a symbolic link."""


def read_tree(directory: Path) -> Directory:
    """Read a directory. All of it is on the disk."""
    return _read(directory, {})


def _read(directory: Path, known: dict[int, File]) -> Directory:
    entries: dict[str, Entry] = {}
    for path in directory.iterdir():
        if path.is_symlink():
            entries[path.name] = os.readlink(path)
        elif path.is_dir():
            entries[path.name] = _read(path, known)
        else:
            entries[path.name] = known.setdefault(path.stat().st_ino, File(path))
    return Directory(entries, dict(entries))


def replay(tree: Directory, journal: Path, copies: Path) -> None:
    """Apply the changes in a journal to a tree, which is the directory before them."""
    for line in journal.read_text(encoding="utf-8").splitlines():
        _, operation, path, other, number = line.split("\t")
        if operation == "sync":
            _sync(tree.at(path), copies / number)
        elif operation == "write":
            _file(tree, path).written += int(number)
        elif operation == "truncate":
            file = _file(tree, path)
            file.cut_to = min(int(number), int(number) if file.cut_to is None else file.cut_to)
        elif operation != "failed":
            _rename_or_make(tree, operation, path, other)


def _file(tree: Directory, path: str) -> File:
    found = tree.at(path)
    assert isinstance(found, File), path
    return found


def _sync(entry: Entry, copy: Path) -> None:
    if isinstance(entry, Directory):
        entry.synced = dict(entry.entries)
    elif isinstance(entry, File):
        entry.synced, entry.cut_to = copy, None


def _rename_or_make(tree: Directory, operation: str, path: str, other: str) -> None:
    parent, name = tree.parent(path)
    match operation:
        case "create":
            parent.entries[name] = File()
        case "mkdir":
            parent.entries[name] = Directory()
        case "symlink":
            parent.entries[name] = other
        case "link":
            parent.entries[name] = File(Path(other)) if other.startswith("/") else tree.at(other)
        case "unlink" | "rmdir":
            del parent.entries[name]
        case "rename":
            target, new = tree.parent(other)
            target.entries[new] = parent.entries.pop(name)
        case _:
            raise AssertionError(operation)


def write_tree(tree: Directory, directory: Path, names_kept: bool) -> None:
    """Replace a directory by the tree as it is after a power cut."""
    shutil.rmtree(directory)
    _write(tree, directory, names_kept, {})


def _write(tree: Directory, directory: Path, names_kept: bool, written: dict[int, Path]) -> None:
    directory.mkdir()
    for name, entry in (tree.entries if names_kept else tree.synced).items():
        path = directory / name
        if isinstance(entry, str):
            path.symlink_to(entry)
        elif isinstance(entry, Directory):
            _write(entry, path, names_kept, written)
        elif id(entry) in written:
            path.hardlink_to(written[id(entry)])
        else:
            path.write_bytes(entry.content(names_kept))
            written[id(entry)] = path


def names_of(tree: Directory, before: str = "") -> dict[str, File | str | None]:
    """Return all paths below a tree. A directory has None."""
    found: dict[str, File | str | None] = {}
    for name, entry in tree.entries.items():
        path = f"{before}{name}"
        if isinstance(entry, Directory):
            found |= {path: None, **names_of(entry, f"{path}/")}
        else:
            found[path] = entry
    return found
