"""Files written front to back: every byte, with direct I/O and without it, and every error of the disk."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import streamed
from pipeline.streamed import StreamedFile

PAGE = 4096


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _buffers_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_BUFFER_BYTES", PAGE)


def refuse(function: str, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without direct I/O, which says so when a file is opened, or when it is written to."""
    real = getattr(os, function)
    direct = streamed._DIRECT

    def run(first: Any, second: Any, *others: Any) -> Any:
        flags = second if function == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
        if flags & direct:
            raise OSError(number, "Invalid argument")
        return real(first, second, *others)

    monkeypatch.setattr(streamed.os, function, run)


def cut_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes at most 100 bytes at a time, as it may."""
    real = os.write
    monkeypatch.setattr(streamed.os, "write", lambda descriptor, data: real(descriptor, data[:100]))


FILE_SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "as it is": lambda _: None,
    "no O_DIRECT in the system": lambda patch: patch.setattr(streamed, "_DIRECT", 0),
    "not direct at open": lambda patch: refuse("open", patch, errno.EINVAL),
    "not direct at write": lambda patch: refuse("write", patch, errno.EINVAL),
    "not supported at open": lambda patch: refuse("open", patch, errno.EOPNOTSUPP),
    "writes cut short": cut_writes,
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
    try:
        os.close(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT | streamed._DIRECT))
    except OSError:
        pytest.skip("no direct I/O on this file system")
    was_direct, real = [], os.write

    def run(descriptor: int, data: Any) -> int:
        was_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & streamed._DIRECT))
        return real(descriptor, data)

    monkeypatch.setattr(streamed.os, "write", run)
    written(tmp_path / "file", disk, os.urandom(3 * PAGE + 1), PAGE)
    assert was_direct == [bool(streamed._DIRECT)] * 3 + [False]


def test_the_disk_is_made_to_keep_up_where_writes_are_not_direct(
    tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(streamed, "_DIRECT", 0)
    monkeypatch.setattr(streamed, "_SYNC_BYTES", 2 * PAGE)
    monkeypatch.setattr(streamed.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    written(tmp_path / "file", disk, bytes(5 * PAGE), PAGE)
    assert synced == [2 * PAGE, 4 * PAGE, 5 * PAGE]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_reaches_who_appends(
    number: int, tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(streamed.os, "write", fail)
    file = StreamedFile(tmp_path / "file", disk)
    with pytest.raises(OSError, match=os.strerror(number)):
        for _ in range(streamed._BUFFERS + 1):
            file.append(bytes(PAGE))
    file.close()


def test_a_file_can_be_closed_twice_and_unfinished(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    file = StreamedFile(tmp_path / "file", disk)
    file.append(b"some")
    file.close()
    file.close()
