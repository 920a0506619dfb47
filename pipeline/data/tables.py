"""Tables on disk: written row by row, read through a memory map, made once for each key.

Whoever comes first writes, among any number of processes and runs; the others wait for its lock and find the table
whole. A barrier would not do: some stages prepare data on every process, others on the main one alone.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import xxhash
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from pipeline.config import PipelineConfig
from pipeline.runs import artifacts

DIRECTORY = "data"

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def table(
    config: PipelineConfig, key: Iterable[Any], features: Features, rows: Callable[[], Iterable[dict[str, Any]]]
) -> Dataset:
    """The table of this key in <run_dir>/data, written first if it is not there.

    Args:
        config: says which run.
        key: everything that the rows depend on; its repr has to say it all.
        features: the columns.
        rows: makes the rows; not called if the table is there. What it raises is raised here, and leaves no table.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = artifacts.stage_dir(config, DIRECTORY)
    fingerprint = xxhash.xxh3_128_hexdigest(repr((datasets.__version__, *key, features)).encode())
    try:
        with no_progress_bars():  # the rows have one of their own
            return Dataset.from_generator(rows, features=features, cache_dir=str(directory), fingerprint=fingerprint)
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _DISK_IS_FULL:  # others may come from reading the rows
            raise artifacts.not_writable(config, directory, cause) from error
        raise cause from None
    except OSError as error:
        raise artifacts.not_writable(config, directory, error) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Let `datasets` show none of its own."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()
