"""Large files, written front to back and read in parts, past the page cache where the file system allows it.

Through the page cache the kernel copies each byte into pages, or out of pages, that it has to find first: that takes
more of the processor's time than decoding the byte, and drives out what others need. With direct I/O (O_DIRECT of
open(2)) bytes go between the disk and the process's own memory. Addresses, offsets and sizes must then be aligned: that
is what the buffers are for. What lies in the page cache already is read from there, which no disk is faster than.
"""

import ctypes
import errno
import fcntl
import os
from collections import deque
from concurrent.futures import Executor, Future
from mmap import PAGESIZE, PROT_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_BUFFER_BYTES = 1 << 24  # written at once; a multiple of every alignment that a file system asks for
_BUFFERS = 3  # one being filled, one being written, one waiting
_SYNC_BYTES = 1 << 28  # without direct I/O: bytes after which the disk has to take what the page cache holds
_WORD_BYTES = 8
_LEAST_DIRECT_BYTES = 1 << 20  # to read; for less, reading ahead is worth more than the processor's time


class StreamedFile:
    """A file that is appended to by one thread and written by another.

    Attributes:
        size: bytes appended.
    """

    def __init__(self, path: Path, disk: Executor) -> None:
        """Create `path`, or empty it; `disk` runs one task at a time."""
        self.size = 0
        self._descriptor, self._is_direct = _open(path)
        self._disk = disk
        self._free = [np.frombuffer(mmap(-1, _BUFFER_BYTES), np.uint8) for _ in range(_BUFFERS)]  # aligned to pages
        self._filling = self._free[0]
        self._writing: deque[tuple[Future[None], np.ndarray]] = deque()
        self._unsynced = 0

    def append(self, data: Any) -> None:
        """Take a copy of some bytes.

        Raises:
            OSError: from writing these or earlier ones.
        """
        left = np.frombuffer(data, np.uint8)
        while len(left):
            start = self.size % _BUFFER_BYTES
            if start == 0:
                self._filling = self._empty_buffer()
            count = min(len(left), _BUFFER_BYTES - start)
            self._filling[start : start + count] = left[:count]
            left = left[count:]
            self.size += count
            if start + count == _BUFFER_BYTES:
                self._writing.append((self._disk.submit(self._write, self._filling), self._filling))

    def finish(self) -> None:
        """Wait until all is on the disk.

        Raises:
            OSError: from writing.
        """
        while self._writing:
            self._wait()
        self._leave_direct()  # for an end that is not aligned
        self._write(self._filling[: self.size % _BUFFER_BYTES])
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file, finished or not; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _empty_buffer(self) -> np.ndarray:
        while not self._free or (self._writing and self._writing[0][0].done()):
            self._wait()
        return self._free.pop()

    def _wait(self) -> None:
        written, buffer = self._writing.popleft()
        self._free.append(buffer)
        written.result()

    def _write(self, buffer: np.ndarray) -> None:
        left = buffer.data
        while left:
            left = left[self._write_some(left) :]
        self._unsynced += len(buffer)
        if not self._is_direct and self._unsynced >= _SYNC_BYTES:
            self._unsynced = 0
            os.fsync(self._descriptor)

    def _write_some(self, data: memoryview) -> int:
        try:
            return os.write(self._descriptor, data)
        except OSError as error:
            if not self._is_direct or error.errno not in _NOT_DIRECT:
                raise
            self._leave_direct()  # some file systems refuse only here, as all do after a write that was cut short
            return os.write(self._descriptor, data)

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._is_direct = False


class StoredFile:
    """A file that is read in parts, by any thread."""

    def __init__(self, path: Path) -> None:
        """Open `path`."""
        self._descriptor = os.open(path, os.O_RDONLY)
        self._direct = _opened_direct(path)
        self._is_direct = self._direct is not None

    def read(self, offset: int, size: int) -> np.ndarray:
        """(size) uint8, writable, aligned to 8 bytes; fewer where the file ends.

        Raises:
            OSError: from reading.
        """
        is_direct = self._is_worth_direct(offset, size)
        lead = offset % PAGESIZE if is_direct else 0
        buffer, start, end = _empty_pages(lead + size), offset - lead, lead + size
        got = max(lead, self._read_direct(buffer, start)) if is_direct else 0
        while got < end:  # the page cache has, or fetches, what a direct read does not give
            count = os.preadv(self._descriptor, [buffer[got:end].data], start + got)
            if count == 0:
                break
            got += count
        return buffer[lead : min(got, end)]

    def close(self) -> None:
        """Let go of the file."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _is_worth_direct(self, offset: int, size: int) -> bool:
        can_be = self._is_direct and offset % _WORD_BYTES == 0  # which a direct read keeps of the alignment in the file
        return can_be and size >= _LEAST_DIRECT_BYTES and not _is_cached(self._descriptor, offset, size)

    def _read_direct(self, buffer: np.ndarray, start: int) -> int:
        """Bytes read, perhaps fewer than the file has: a reason not to go on is for the page cache to meet again."""
        assert self._direct is not None
        got = 0
        try:
            while got < len(buffer) and got % PAGESIZE == 0:  # Linux reads 2 GiB at most at once
                count = os.preadv(self._direct, [buffer[got:].data], start + got)
                if count == 0:
                    break
                got += count
        except OSError:
            self._is_direct = False
        return got


def _open(path: Path) -> tuple[int, bool]:
    """Descriptor to write, and whether writes are direct."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
    except OSError as error:
        if not _DIRECT or error.errno not in _NOT_DIRECT:
            raise
        return os.open(path, flags, 0o666), False


def _opened_direct(path: Path) -> int | None:
    """Descriptor to read, or None where a file that can be opened cannot be opened for this."""
    try:
        return os.open(path, os.O_RDONLY | _DIRECT) if _DIRECT else None
    except OSError:
        return None


def _empty_pages(size: int) -> np.ndarray:
    """Whole pages for `size` bytes."""
    pages = -(-size // PAGESIZE)
    memory = np.empty((pages + 1) * PAGESIZE, np.uint8)
    return memory[-memory.ctypes.data % PAGESIZE :][: pages * PAGESIZE]


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether the page cache holds most of a part of a file, by mincore(2).

    True where the system does not say, also of the files of others that this process may not write to.
    """
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    lead = offset % PAGESIZE
    try:
        pages = mmap(descriptor, lead + size, prot=PROT_READ, offset=offset - lead)  # only to ask: nothing is read
    except (OSError, ValueError):  # ValueError: the file ends before
        return True
    held = np.empty(-(-(lead + size) // PAGESIZE), np.uint8)
    addresses = [ctypes.c_void_p(each.ctypes.data) for each in (np.frombuffer(pages, np.uint8), held)]
    failed = mincore is None or mincore(addresses[0], ctypes.c_size_t(lead + size), addresses[1])
    return bool(failed) or float((held & 1).mean()) > 0.5
