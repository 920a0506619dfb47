"""Files written front to back and read in parts: every byte, direct or not, and every error of the disk."""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import direct_io
from pipeline.direct_io import StoredFile, StreamedFile

PAGE = 4096


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _buffers_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", PAGE)


def refuse(function: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without direct I/O, which says so when a file is opened, or when it is written to."""
    real = getattr(os, function)
    direct = direct_io._DIRECT

    def run(first: Any, second: Any, *others: Any) -> Any:
        flags = second if function == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & direct:
            raise OSError(number, "Invalid argument")
        return real(first, second, *others)

    monkeypatch.setattr(direct_io.os, function, run)


def cut_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes at most 100 bytes at a time, as it may."""
    real = os.write
    monkeypatch.setattr(direct_io.os, "write", lambda descriptor, data: real(descriptor, data[:100]))


FILE_SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "as it is": lambda _: None,
    "no O_DIRECT in the system": lambda patch: patch.setattr(direct_io, "_DIRECT", 0),
    "not direct at open": lambda patch: refuse("open", patch, errno.EINVAL),
    "not direct at write": lambda patch: refuse("write", patch, errno.EINVAL),
    "not supported at open": lambda patch: refuse("open", patch, errno.EOPNOTSUPP),
    "writes cut short": cut_writes,
}


def supports_direct(path: Path, flags: int) -> bool:
    try:
        os.close(os.open(path, flags | direct_io._DIRECT))
    except OSError:
        return False
    return bool(direct_io._DIRECT)


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def skip_unless_on_disk(path: Path) -> None:
    """Skips where a file has no direct I/O, or lies in memory (tmpfs), which cannot be forgotten; else forgets it."""
    for _ in range(20):  # the kernel may hold a page for a moment
        forget(path)
        if supports_direct(path, os.O_RDONLY) and has_to_be_waited_for(path):
            forget(path)
            return
        time.sleep(0.05)
    pytest.skip("needs direct I/O, and a file system on a disk")


def has_to_be_waited_for(path: Path) -> bool:
    """Whether the page cache does not hold the beginning of a file; asking may have it fetched."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except OSError as error:  # tmpfs has no such reads
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    return False


def watched_reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each read that follows is direct."""
    was_direct, real = [], os.preadv

    def run(descriptor: int, buffers: Any, offset: int) -> int:
        was_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io._DIRECT))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(direct_io.os, "preadv", run)
    return was_direct


def cut_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives at most 100 bytes at a time, as it may."""
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
    "reads cut short": cut_reads,
}


def written(path: Path, disk: ThreadPoolExecutor, data: bytes, step: int) -> int:
    file = StreamedFile(path, disk)
    for start in range(0, len(data), step):
        part = bytearray(data[start : start + step])
        file.append(part)
        part[:] = bytes(len(part))  # a file has its own copy
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
    assert written(tmp_path / "file", disk, data, step) == size
    assert (tmp_path / "file").read_bytes() == data


def test_an_older_file_leaves_nothing(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * PAGE))
    written(tmp_path / "file", disk, b"new", 3)
    assert (tmp_path / "file").read_bytes() == b"new"


def test_writes_are_direct_where_they_can_be(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supports_direct(tmp_path / "file", os.O_WRONLY | os.O_CREAT):
        pytest.skip("needs direct I/O")
    was_direct, real = [], os.write

    def run(descriptor: int, data: Any) -> int:
        was_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct_io._DIRECT))
        return real(descriptor, data)

    monkeypatch.setattr(direct_io.os, "write", run)
    written(tmp_path / "file", disk, os.urandom(3 * PAGE + 1), PAGE)
    assert was_direct == [True] * 3 + [False]


def test_the_disk_is_made_to_keep_up_where_writes_are_not_direct(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(direct_io, "_DIRECT", 0)
    monkeypatch.setattr(direct_io, "_SYNC_BYTES", 2 * PAGE)
    monkeypatch.setattr(direct_io.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    written(tmp_path / "file", disk, bytes(5 * PAGE), PAGE)
    assert synced == [2 * PAGE, 4 * PAGE, 5 * PAGE]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_reaches_who_appends(
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


def test_a_file_can_be_closed_twice_and_unfinished(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    file = StreamedFile(tmp_path / "file", disk)
    file.append(b"some")
    file.close()
    file.close()


@pytest.mark.parametrize("where", READ_FROM)
@pytest.mark.parametrize("offset", [0, 8, 13, PAGE - 8, PAGE, 2 * PAGE + 1000])
@pytest.mark.parametrize("size", [0, 1, 1000, PAGE, 3 * PAGE + 5, 6 * PAGE])
def test_a_part_of_a_file_is_read_as_it_is(
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
        assert part.tobytes() == data[offset : offset + size]  # fewer where the file ends
        assert part.ctypes.data % 8 == 0
        part[:] = 0  # the reader's own memory
    file.close()


@pytest.mark.parametrize(
    ("offset", "size", "is_direct"),
    [(16, 3 * PAGE, True), (16, PAGE - 8, False), (13, 3 * PAGE, False)],
    ids=["large", "small", "not aligned to a word"],
)
def test_what_is_not_in_the_page_cache_is_read_past_it(
    offset: int, size: int, is_direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(8 * PAGE))
    skip_unless_on_disk(tmp_path / "file")
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", PAGE)
    file = StoredFile(tmp_path / "file")
    was_direct = watched_reads(monkeypatch)
    for _ in range(2):  # a direct read leaves nothing in the page cache
        file.read(offset, size)
        assert was_direct == [is_direct]
        was_direct.clear()
    (tmp_path / "file").read_bytes()
    file.read(offset, size)
    assert was_direct == [False]
    file.close()


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_file_that_shrinks_gives_what_is_left(
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
def test_an_error_of_the_disk_reaches_who_reads(
    is_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_file_system_that_refuses_direct_reads_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    skip_unless_on_disk(tmp_path / "file")
    monkeypatch.setattr(direct_io, "_LEAST_DIRECT_BYTES", 1)
    monkeypatch.setattr(direct_io, "_is_cached", lambda *_: False)
    refuse("preadv", monkeypatch, errno.ENOSYS)
    was_direct = watched_reads(monkeypatch)
    file = StoredFile(tmp_path / "file")
    assert [len(file.read(0, 4 * PAGE)) for _ in range(2)] == [4 * PAGE] * 2
    assert was_direct == [True, False, False]
    file.close()


def test_closing_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some")
    before = os.listdir("/dev/fd")
    StoredFile(tmp_path / "file").close()
    assert os.listdir("/dev/fd") == before


def test_the_page_cache_is_asked_for_pages(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 * PAGE))
    skip_unless_on_disk(path)
    descriptor = os.open(path, os.O_RDONLY)
    assert not direct_io._is_cached(descriptor, 100, 60 * PAGE)
    path.read_bytes()
    assert direct_io._is_cached(descriptor, 100, 60 * PAGE)
    assert direct_io._is_cached(descriptor, 60 * PAGE, 10 * PAGE)  # beyond the end there is nothing to ask for
    os.close(descriptor)
