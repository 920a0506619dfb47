"""The setting of torch's allocator for GPU memory."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that torch 2.13 reads. The last two are older names of the first."""
_OURS = "expandable_segments:True"


@contextmanager
def growing_segments() -> Iterator[None]:
    """Inside the block, `let_segments_grow`. Then restore the environment. torch keeps the setting that it has read."""
    before = os.environ.get(_SETTINGS[0])
    let_segments_grow()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SETTINGS[0], None)


def let_segments_grow() -> None:
    """Let torch grow its segments of GPU memory, unless the user has chosen a setting. Call this before torch starts.

    Batches have different lengths. If segments cannot grow, memory fragments: many free pieces are too small to use.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ[_SETTINGS[0]] = _OURS


def without_our_setting(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without our setting, for another program such as an inference engine.

    Engines share GPU memory between their processes with CUDA's IPC handles. These handles do not work for segments
    that grow. A user's setting with the same value is left out as well.
    """
    is_ours = environment.get(_SETTINGS[0]) == _OURS
    return {name: value for name, value in environment.items() if not (is_ours and name == _SETTINGS[0])}
