"""Lets runs of the tests share large tables of rows. The synthetic data set takes 0.4 seconds.

A table's fingerprint covers the data, the settings and the code that makes it. So a copy of a table with the same
fingerprint is the table that the program would make. The demonstration's data sets are an exception: they are also
written as files of the run, and their tables name these files. So a run with such files shares no table.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FEWEST_ROWS = 400
"""Smaller tables are made as always. For example, a test may look for the warnings about its rows."""


def share_tables(patch: Callable[[Any, str, Any], object], shared_directory: str) -> None:
    """Let `datasets` copy tables from a directory, and add new ones. `patch` sets an attribute, as `setattr` does."""
    from datasets import Dataset

    make, tables = Dataset.from_generator, Path(shared_directory, "tables")

    def make_or_copy(generator: Any, *, cache_dir: str, fingerprint: str, **options: Any) -> Dataset:
        shared, own = tables / fingerprint, Path(cache_dir)
        if shared.is_dir() and not list(own.glob(f"*/*={fingerprint}")):
            shutil.copytree(shared, own, dirs_exist_ok=True)
        made: Dataset = make(generator, cache_dir=cache_dir, fingerprint=fingerprint, **options)
        if len(made) >= _FEWEST_ROWS and not _files(own) and not shared.is_dir():
            _add(shared, own, fingerprint)
        return made

    patch(Dataset, "from_generator", staticmethod(make_or_copy))


def _files(directory: Path) -> list[Path]:
    """List the files in a directory, without locks."""
    return [path for path in directory.iterdir() if path.is_file() and path.suffix != ".lock"]


def _add(shared: Path, own: Path, fingerprint: str) -> None:
    """Copy a table under a name that no reader takes for a whole table, then rename it."""
    shared.parent.mkdir(exist_ok=True)
    copied = Path(tempfile.mkdtemp(dir=shared.parent))
    for folder in own.glob(f"*/*={fingerprint}"):
        shutil.copytree(folder, copied / folder.relative_to(own))
    try:
        os.rename(copied, shared)
    except OSError:  # another process has just added it
        shutil.rmtree(copied)
