"""Write files so that neither a kill nor a power cut leaves a part of them under their final name."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace a file atomically by the temporary file that the block writes. Afterwards the file is on the disk.

    If the block fails, the temporary file is removed, and the earlier file stays as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a text file. See `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def cut_torn_line(path: Path) -> None:
    """Remove the end of a file after its last line break. A crash while a line was appended leaves such an end."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            file.truncate(whole)


def sync_tree(directory: Path) -> None:
    """Wait until all files below a directory are on the disk. Links are not followed."""
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(parent))


def sync_names(path: Path, top: Path) -> None:
    """Wait until the names of a file or directory and of its parents below `top` are on the disk."""
    for parent in path.parents:
        sync(parent)
        if parent == top:
            return


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
