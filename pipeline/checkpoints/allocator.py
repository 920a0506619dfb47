"""Sets the C library's allocator to keep the memory of freed tensors."""

import ctypes

_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1  # malloc.h of glibc
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for new ones, so that the kernel does not have to zero pages again.

    This helps a conversion, which creates and frees many tensors of equal size. Without it, page faults take a quarter
    of the conversion's time on a CPU.
    The function does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
