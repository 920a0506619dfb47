"""Stores tables on disk, one for each key. A table is written row by row and read through a memory map.

If several processes or runs need the same table, the first process locks and writes it. The other processes wait for
the lock, and then read the complete table. A barrier would not work: some stages prepare data on every process,
but other stages only on the main process.
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import datasets
import xxhash
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from pipeline.runs.run import DATA_DIR, Run

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
        with no_progress_bars():  # `rows` shows its own progress bar
            return Dataset.from_generator(rows, features=features, cache_dir=str(directory), fingerprint=fingerprint)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _DISK_IS_FULL:  # other OSErrors may come from reading the rows
            raise run.not_writable(directory, cause) from error
        raise cause from None
    except OSError as error:
        raise run.not_writable(directory, error) from error


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
