"""The program lets segments of GPU memory grow, but keeps the user's setting. Engines do not inherit its setting."""

import os
import sys
from pathlib import Path

import pytest

from pipeline import __main__ as program
from pipeline.runs import allocator
from pipeline.serve.process import EngineProcess

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
SHOW = f"import os; print({{name: os.environ[name] for name in {NAMES} if name in os.environ}})"
OURS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores the variable after the test
        monkeypatch.delenv(name)


def chosen() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def test_the_program_lets_segments_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", "--help"])
    with pytest.raises(SystemExit):
        program.main()
    assert chosen() == OURS


@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}])
def test_the_library_sets_it_only_during_a_call(own: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError), allocator.growing_segments():
        assert chosen() == (own or OURS)
        raise KeyError
    assert chosen() == own


@pytest.mark.parametrize("name", NAMES)
def test_a_setting_of_the_user_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    allocator.let_segments_grow()
    assert chosen() == {name: "max_split_size_mb:128"}
    assert allocator.without_our_setting(os.environ) == dict(os.environ)


def test_an_engine_does_not_inherit_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator.let_segments_grow()
    monkeypatch.setenv("ANOTHER", "1")
    log = tmp_path / "log"
    with EngineProcess("vllm", [sys.executable, "-c", SHOW + "; print(os.environ['ANOTHER'])"], log, {}) as engine:
        engine._process.wait(timeout=60)
    assert log.read_text().split("\n")[:2] == ["{}", "1"]
    assert chosen() == OURS
