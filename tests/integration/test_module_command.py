"""Child processes import this program, even if the working directory has files with the same names."""

import subprocess
from pathlib import Path

import pytest

from pipeline.runs import gpus
from pipeline.runs.processes import module_command

HIDING = "raise SystemExit('the file of the user ran')\n"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory. Its files have the names of this program, a library and a module of Python."""
    for name in ("pipeline", "torch", "json"):
        (tmp_path / f"{name}.py").write_text(HIDING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def test_a_module_of_the_program_runs() -> None:
    """The memory of GPUs is measured in a process of its own."""
    assert gpus.free_bytes() == gpus.measure_free_bytes()  # [] on a machine without a GPU


def test_a_module_gets_its_arguments_and_is_the_main_module(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = directory / "other"
    other.mkdir()
    (other / "printer.py").write_text("import sys\nprint(__name__, sys.argv[1:], sys.stdin.read())\n")
    monkeypatch.setenv("PYTHONPATH", str(other))
    command = module_command("printer", "--a", "b c")
    done = subprocess.run(command, input="typed", capture_output=True, text=True, check=True)
    assert done.stdout == "__main__ ['--a', 'b c'] typed\n"
