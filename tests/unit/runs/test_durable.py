"""Files are replaced as a whole, and are on the disk before a marker says that they are complete."""

import os
from pathlib import Path

import pytest

from pipeline.runs.durable import cut_torn_line, sync_tree, write_text


def watch_syncs(patched: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with the path of each file or directory that is synced."""
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    patched.setattr(os, "fsync", fsync)
    return synced


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_directory_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = watch_syncs(monkeypatch)
    write_text(tmp_path / "file", "new\n")
    assert (tmp_path / "file").read_bytes() == b"new\n"
    assert synced == [str(tmp_path / "file.tmp"), str(tmp_path)]


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(("text", "whole"), [(b"1\n2", b"1\n"), (b"1\n", b"1\n"), (b"torn", b""), (b"", b"")])
def test_only_whole_lines_remain(tmp_path: Path, text: bytes, whole: bytes) -> None:
    (tmp_path / "lines").write_bytes(text)
    cut_torn_line(tmp_path / "lines")
    assert (tmp_path / "lines").read_bytes() == whole


def test_a_missing_file_has_no_torn_line(tmp_path: Path) -> None:
    cut_torn_line(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_every_file_and_directory_of_a_tree_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    (tree / "sub").mkdir(parents=True)
    for path in (tree / "a", tree / "sub" / "b", other):
        path.write_text("x")
    (tree / "link").symlink_to(other)
    synced = watch_syncs(monkeypatch)
    sync_tree(tree)
    assert sorted(synced) == sorted(map(str, (tree, tree / "a", tree / "sub", tree / "sub" / "b")))
