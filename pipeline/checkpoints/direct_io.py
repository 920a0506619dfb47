"""Writes large files sequentially and reads parts of them, with direct I/O if the file system allows it.

Without direct I/O, the kernel copies each byte through the page cache. This takes more processor time than decoding the
byte, and evicts the pages of other programs. Direct I/O (O_DIRECT of open(2)) transfers bytes between the disk and the
process's own memory. Addresses, offsets and sizes must then be aligned, so this module uses aligned buffers. Data that
is already in the page cache is read from there, because this is faster than any disk.
"""

import ctypes
import errno
import fcntl
import os
from collections import deque
from concurrent.futures import Executor, Future
from mmap import PAGESIZE, PROT_READ, mmap
from pathlib import Path

import numpy as np

_DIRECT = getattr(os, "O_DIRECT", 0)  # only Linux has it
_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_BUFFER_BYTES = 1 << 24  # size of one write; a multiple of every alignment that a file system requires
_BUFFERS = 3  # one is filled, one is written to the disk, and one waits to be written
_SYNC_BYTES = 1 << 28  # without direct I/O, the page cache is flushed to the disk each time this many bytes are written
_WORD_BYTES = 8
_LEAST_DIRECT_BYTES = 1 << 20  # for smaller reads, the kernel's read-ahead saves more than direct I/O does


class StreamedFile:
    """A file that is written by two threads: one appends to a buffer, the other writes full buffers to the disk.

    Attributes:
        size: number of bytes appended so far.
    """

    def __init__(self, path: Path, disk: Executor) -> None:
        """Create `path`, or truncate it. `disk` must run one task at a time."""
        self.size = 0
        self._descriptor, self._is_direct = _open(path)
        self._disk = disk
        self._free = [np.frombuffer(mmap(-1, _BUFFER_BYTES), np.uint8) for _ in range(_BUFFERS)]  # aligned to pages
        self._filling = self._free[0]
        self._writing: deque[tuple[Future[None], np.ndarray]] = deque()
        self._unsynced = 0

    def append(self, data: bytes | memoryview) -> None:
        """Append a copy of `data`.

        Raises:
            OSError: this data, or data appended earlier, could not be written.
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
        """Wait until all bytes are on the disk.

        Raises:
            OSError: some bytes could not be written.
        """
        while self._writing:
            self._wait()
        self._leave_direct()  # direct I/O requires an aligned size, which the last write need not have
        self._write(self._filling[: self.size % _BUFFER_BYTES])
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file, even if it is not finished. A second call does nothing."""
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
            # Some file systems accept direct I/O at open(2), but refuse it at a write. After a partial write, every
            # file system refuses it.
            self._leave_direct()
            return os.write(self._descriptor, data)

    def _leave_direct(self) -> None:
        if self._is_direct:
            flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
            self._is_direct = False


class StoredFile:
    """A file that any thread can read in parts."""

    def __init__(self, path: Path) -> None:
        """Open `path`."""
        self._descriptor = os.open(path, os.O_RDONLY)
        self._direct = _open_direct(path)
        self._is_direct = self._direct is not None

    def read(self, offset: int, size: int) -> np.ndarray:
        """Read `size` bytes as a uint8 array, writable and aligned to 8 bytes.

        If the file ends early, the array is shorter.

        Raises:
            OSError: the file could not be read.
        """
        is_direct = self._is_worth_direct(offset, size)
        lead = offset % PAGESIZE if is_direct else 0
        buffer, start, end = _empty_pages(lead + size), offset - lead, lead + size
        got = max(lead, self._read_direct(buffer, start)) if is_direct else 0
        while got < end:  # the rest is read through the page cache
            count = os.preadv(self._descriptor, [buffer[got:end].data], start + got)
            if count == 0:
                break
            got += count
        return buffer[lead : min(got, end)]

    def close(self) -> None:
        """Close the file."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _is_worth_direct(self, offset: int, size: int) -> bool:
        is_possible = self._is_direct and offset % _WORD_BYTES == 0  # the returned array is aligned like the offset
        return is_possible and size >= _LEAST_DIRECT_BYTES and not _is_cached(self._descriptor, offset, size)

    def _read_direct(self, buffer: np.ndarray, start: int) -> int:
        """Read into `buffer` with direct I/O, and return the number of bytes read.

        If an error stops the reading early, `read` reads the rest.
        """
        assert self._direct is not None
        got = 0
        try:
            while got < len(buffer) and got % PAGESIZE == 0:  # Linux reads at most 2 GiB at once
                count = os.preadv(self._direct, [buffer[got:].data], start + got)
                if count == 0:
                    break
                got += count
        except OSError:
            self._is_direct = False
        return got


def _open(path: Path) -> tuple[int, bool]:
    """Open a file for writing. Return its descriptor, and whether writes are direct."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
    except OSError as error:
        if not _DIRECT or error.errno not in _NOT_DIRECT:
            raise
        return os.open(path, flags, 0o666), False


def _open_direct(path: Path) -> int | None:
    """Open a file for direct reads. Returns its descriptor, or None if the file cannot be opened in this way."""
    try:
        return os.open(path, os.O_RDONLY | _DIRECT) if _DIRECT else None
    except OSError:
        return None


def _empty_pages(size: int) -> np.ndarray:
    """Allocate page-aligned memory of whole pages for `size` bytes."""
    pages = -(-size // PAGESIZE)
    memory = np.empty((pages + 1) * PAGESIZE, np.uint8)
    return memory[-memory.ctypes.data % PAGESIZE :][: pages * PAGESIZE]


def _is_cached(descriptor: int, offset: int, size: int) -> bool:
    """Return whether the page cache holds most of this part of a file, according to mincore(2).

    The kernel gives this information only if the user of this process owns the file or may write to it. Without the
    information, return True.
    """
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    lead = offset % PAGESIZE
    try:
        pages = mmap(
            descriptor, lead + size, prot=PROT_READ, offset=offset - lead
        )  # mapped only for the query; the data is not read
    except (OSError, ValueError):  # ValueError: the file ends before this part
        return True
    held = np.empty(-(-(lead + size) // PAGESIZE), np.uint8)
    addresses = [ctypes.c_void_p(each.ctypes.data) for each in (np.frombuffer(pages, np.uint8), held)]
    failed = mincore is None or mincore(addresses[0], ctypes.c_size_t(lead + size), addresses[1])
    return bool(failed) or float((held & 1).mean()) > 0.5
