"""Files hold and return every byte, with and without direct I/O, and every error of the disk is raised."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints import direct_io
from pipeline.checkpoints.direct_io import StoredFile, StreamedFile

PAGE = 4096


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _buffers_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", PAGE)


def refuse(function: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Simulate a file system without direct I/O: os.`function` fails with the error `number`."""
    real = getattr(os, function)
    direct = direct_io._DIRECT

    def run(first: Any, second: Any, *others: Any) -> Any:
        flags = second if function == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & direct:
            raise OSError(number, "Invalid argument")
        return real(first, second, *others)

    monkeypatch.setattr(direct_io.os, function, run)


def truncate_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a system that writes at most 100 bytes at a time, as POSIX allows."""
    real = os.write
    monkeypatch.setattr(direct_io.os, "write", lambda descriptor, data: real(descriptor, data[:100]))


FILE_SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "as it is": lambda _: None,
    "no O_DIRECT in the system": lambda patch: patch.setattr(direct_io, "_DIRECT", 0),
    "not direct at open": lambda patch: refuse("open", patch, errno.EINVAL),
    "not direct at write": lambda patch: refuse("write", patch, errno.EINVAL),
    "not supported at open": lambda patch: refuse("open", patch, errno.EOPNOTSUPP),
    "partial writes": truncate_writes,
}


def supports_direct(path: Path, flags: int) -> bool:
    try:
        os.close(os.open(path, flags | direct_io._DIRECT))
    except OSError:
        return False
    return bool(direct_io._DIRECT)


def forget(path: Path) -> None:
    """Evict a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fdatasync(descriptor)  # conftest.py replaces os.fsync
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def skip_unless_on_disk(path: Path) -> None:
    """Evict a file from the page cache. Skip the test if direct I/O does not work or the file is in memory (tmpfs)."""
    for _ in range(20):  # several tries, because the kernel may keep a page for a moment
        forget(path)
        if supports_direct(path, os.O_RDONLY) and is_evicted(path):
            forget(path)
            return
        time.sleep(0.05)
    pytest.skip("needs direct I/O, and a file system on a disk")


def is_evicted(path: Path) -> bool:
    """Return whether the beginning of a file is missing from the page cache.

    The check itself may load the beginning into the page cache.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:  # tmpfs does not support RWF_NOWAIT
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    return False


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Watch all later reads. Each read adds a bool to the returned list: True if the read is direct."""
    was_direct, real = [], os.preadv

    def run(descriptor: int, buffers: Any, offset: int) -> int:
        was_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io._DIRECT))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(direct_io.os, "preadv", run)
    return was_direct


def truncate_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a system that reads at most 100 bytes at a time, as POSIX allows."""
    real = os.preadv

    def run(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = min(100, real(descriptor, buffers, offset))
        buffers[0][count:] = bytes(len(buffers[0]) - count)
        return count

    monkeypatch.setattr(direct_io.os, "preadv", run)


READ_FROM: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the disk": lambda _: None,
    "the page cache": lambda patch: patch.setattr(direct_io, "_is_cached", lambda *_: True),
    "no O_DIRECT in the system": lambda patch: patch.setattr(direct_io, "_DIRECT", 0),
    "not direct at open": lambda patch: refuse("open", patch, errno.EINVAL),
    "not direct at read": lambda patch: refuse("preadv", patch, errno.EINVAL),
    "partial reads": truncate_reads,
}


def write(path: Path, disk: ThreadPoolExecutor, data: bytes, step: int) -> int:
    file = StreamedFile(path, disk)
    for start in range(0, len(data), step):
        part = bytearray(data[start : start + step])
        file.append(part)
        part[:] = bytes(len(part))  # `file` must hold a copy of the part by now
    file.finish()
    file.close()
    return file.size


@pytest.mark.parametrize("file_system", FILE_SYSTEMS)
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 7 * PAGE, 9 * PAGE + 123])
@pytest.mark.parametrize("step", [1000, PAGE, 3 * PAGE + 5])
def test_the_file_holds_what_was_appended(
    size: int, step: int, file_system: str, tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    FILE_SYSTEMS[file_system](monkeypatch)
    data = os.urandom(size)
    assert write(tmp_path / "file", disk, data, step) == size
    assert (tmp_path / "file").read_bytes() == data


def test_an_older_file_is_truncated(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * PAGE))
    write(tmp_path / "file", disk, b"new", 3)
    assert (tmp_path / "file").read_bytes() == b"new"


def test_aligned_writes_are_direct(tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    if not supports_direct(tmp_path / "file", os.O_WRONLY | os.O_CREAT):
        pytest.skip("needs direct I/O")
    was_direct, real = [], os.write

    def run(descriptor: int, data: Any) -> int:
        was_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io._DIRECT))
        return real(descriptor, data)

    monkeypatch.setattr(direct_io.os, "write", run)
    write(tmp_path / "file", disk, os.urandom(3 * PAGE + 1), PAGE)
    assert was_direct == [True] * 3 + [False]


def test_writes_that_are_not_direct_are_synced_regularly(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(direct_io, "_DIRECT", 0)
    monkeypatch.setattr(direct_io, "_SYNC_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct_io.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    write(tmp_path / "file", disk, bytes(5 * PAGE), PAGE)
    assert synced == [2 * PAGE, 4 * PAGE, 5 * PAGE]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_append_raises_errors_of_the_disk(
    number: int, tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(direct_io.os, "write", fail)
    file = StreamedFile(tmp_path / "file", disk)
    with pytest.raises(OSError, match=os.strerror(number)):
        for _ in range(direct_io._BUFFERS + 1):
            file.append(bytes(PAGE))
    file.close()


def test_an_unfinished_file_can_be_closed_twice(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    file = StreamedFile(tmp_path / "file", disk)
    file.append(b"some")
    file.close()
    file.close()


@pytest.mark.parametrize("where", READ_FROM)
@pytest.mark.parametrize("offset", [0, 8, 13, PAGE - 8, PAGE, 2 * PAGE + 1000])
@pytest.mark.parametrize("size", [0, 1, 1000, PAGE, 3 * PAGE + 5, 6 * PAGE])
def test_a_read_returns_the_bytes_of_the_file(
    size: int, offset: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(7 * PAGE + 123)
    (tmp_path / "file").write_bytes(data)
    forget(tmp_path / "file")
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", 1)
    READ_FROM[where](monkeypatch)
    file = StoredFile(tmp_path / "file")
    for _ in range(2):
        part = file.read(offset, size)
        assert part.tobytes() == data[offset : offset + size]  # at the end of the file the part is shorter than `size`
        assert part.ctypes.data % 8 == 0
        part[:] = 0  # this must not change what the next read returns
    file.close()


@pytest.mark.parametrize(
    ("offset", "size", "is_direct"),
    [(16, 3 * PAGE, True), (16, PAGE - 8, False), (13, 3 * PAGE, False)],
    ids=["large", "small", "not aligned to a word"],
)
def test_large_aligned_reads_are_direct_unless_the_page_cache_has_the_data(
    offset: int, size: int, is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(8 * PAGE))
    skip_unless_on_disk(tmp_path / "file")
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", PAGE)
    file = StoredFile(tmp_path / "file")
    was_direct = watch_reads(monkeypatch)
    for _ in range(2):  # a direct read leaves nothing in the page cache
        file.read(offset, size)
        assert was_direct == [is_direct]
        was_direct.clear()
    (tmp_path / "file").read_bytes()
    file.read(offset, size)
    assert was_direct == [False]
    file.close()


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_read_of_a_shrunken_file_returns_the_remaining_bytes(
    is_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", 1)
    monkeypatch.setattr(direct_io, "_is_cached", lambda *_: is_cached)
    file = StoredFile(tmp_path / "file")
    os.truncate(tmp_path / "file", PAGE + 1000)
    assert file.read(16, 4 * PAGE).tobytes() == (bytes(range(256)) * 64)[16 : PAGE + 1000]
    assert len(file.read(2 * PAGE, PAGE)) == 0
    file.close()


@pytest.mark.parametrize("is_cached", [True, False])
def test_read_raises_errors_of_the_disk(is_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", 1)
    monkeypatch.setattr(direct_io, "_is_cached", lambda *_: is_cached)
    monkeypatch.setattr(direct_io.os, "preadv", fail)
    file = StoredFile(tmp_path / "file")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        file.read(0, 4 * PAGE)
    file.close()


def test_direct_reads_are_not_tried_again_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    skip_unless_on_disk(tmp_path / "file")
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", 1)
    monkeypatch.setattr(direct_io, "_is_cached", lambda *_: False)
    refuse("preadv", monkeypatch, errno.ENOSYS)
    was_direct = watch_reads(monkeypatch)
    file = StoredFile(tmp_path / "file")
    assert [len(file.read(0, 4 * PAGE)) for _ in range(2)] == [4 * PAGE] * 2
    assert was_direct == [True, False, False]
    file.close()


def test_closing_a_file_closes_its_descriptors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some")
    before = os.listdir("/dev/fd")
    StoredFile(tmp_path / "file").close()
    assert os.listdir("/dev/fd") == before


def test_is_cached_tells_whether_the_page_cache_holds_a_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE))
    skip_unless_on_disk(path)
    descriptor = os.open(path, os.O_RDONLY)
    assert not direct_io._is_cached(descriptor, 100, 60 * PAGE)
    path.read_bytes()
    assert direct_io._is_cached(descriptor, 100, 60 * PAGE)
    assert direct_io._is_cached(descriptor, 60 * PAGE, 10 * PAGE)  # this range extends beyond the end of the file
    os.close(descriptor)
