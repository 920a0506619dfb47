"""Paths as settings give them."""

from pathlib import Path

import pytest

from pipeline.runs.paths import absolute


def test_a_relative_path_starts_in_the_working_directory_and_a_tilde_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute("runs/a") == tmp_path / "runs" / "a"
    assert absolute("~/runs") == tmp_path / "home" / "runs"
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert absolute(Path("link")) == tmp_path / "link"
