"""A setting of the C library's allocator: keep the memory of freed tensors."""

import ctypes

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # malloc.h of glibc
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Reuse the memory of freed tensors, instead of returning it to the kernel, which zeroes every page again.

    This helps streams of equally large tensors: page faults take a quarter of a conversion's time on a CPU. It does
    nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
