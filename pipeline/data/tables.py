"""Stores tables on disk, one for each key. A table is written row by row and read through a memory map.

If several processes or runs need the same table, the first process locks and writes it. The other processes wait for
the lock, and then read the complete table. A barrier would not work: some stages prepare data on every process,
but other stages only on the main process.

`datasets` does not wait until a table is on the disk. A power cut could leave a table with its final name, but without
its contents. So a table counts only if it has the file `whole`, which is written when all of it is on the disk.
"""

import errno
import fcntl
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import datasets
import xxhash
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from pipeline.runs.durable import sync_tree, write_text
from pipeline.runs.run import DATA_DIR, Run

_WHOLE = "whole"
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def table(
    run: Run, key: Iterable[object], features: Features, rows: Callable[[], Iterable[Mapping[str, object]]]
) -> Dataset:
    """Return the table for this key from <run_dir>/data. If the table does not exist, write it first.

    Args:
        run: the run whose directory holds the table.
        key: everything that determines the rows. The repr of the key identifies the table.
        features: names and types of the columns.
        rows: function that makes the rows. It is not called if the table exists. If it raises an error, the caller
            gets this error and no table is stored.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = run.stage_dir(DATA_DIR)
    fingerprint = xxhash.xxh3_128_hexdigest(repr((datasets.__version__, *key, features)).encode())
    try:
        with _one_at_a_time(directory, fingerprint), no_progress_bars():  # `rows` shows its own progress bar
            for folder in _folders(directory, fingerprint):
                if not (folder / _WHOLE).is_file():
                    shutil.rmtree(folder)
            made = Dataset.from_generator(rows, features=features, cache_dir=str(directory), fingerprint=fingerprint)
            for folder in _folders(directory, fingerprint):
                _mark_whole(folder)
            return made
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _DISK_IS_FULL:  # other OSErrors may come from reading the rows
            raise run.not_writable(directory, cause) from error
        raise cause from None
    except OSError as error:
        raise run.not_writable(directory, error) from error


def _folders(directory: Path, fingerprint: str) -> list[Path]:
    """Return the folder of a table: a list with one path, or none if there is no such table."""
    return list(directory.glob(f"*/*={fingerprint}"))


def _mark_whole(folder: Path) -> None:
    if not (folder / _WHOLE).is_file():
        sync_tree(folder)
        write_text(folder / _WHOLE, "")


@contextmanager
def _one_at_a_time(directory: Path, fingerprint: str) -> Iterator[None]:
    """Let one process or thread after the other make a table, or find it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{fingerprint}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switch off the progress bars of `datasets`."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
