"""The Dockerfile is checked without a builder: its files exist, and they suffice to install the program.

The image itself is not built here, because this needs a container builder and a network.
"""

import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT"}
ENVIRONMENT = "PIP_NO_CACHE_DIR=1 bash -c 'source scripts/environment'"
Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    """The instructions of the Dockerfile, each with its arguments in one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in whole.splitlines() if line.strip()]


def values(instructions: list[Instruction], name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions if instruction == name]


def copied(instructions: list[Instruction]) -> list[tuple[list[str], str]]:
    """Return sources and destination of each COPY."""
    return [(words[:-1], words[-1]) for words in (arguments.split() for arguments in values(instructions, "COPY"))]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file or folder of the checkout out. Its last pattern that matches decides."""
    found = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            kept, name = pattern.startswith("!"), pattern.lstrip("!")
            if fnmatch(path.partition("/")[0], name) or fnmatch(path, name):
                found = not kept
    return found


def test_every_instruction_is_known_and_the_base_is_a_pinned_cuda_image(instructions: list[Instruction]) -> None:
    assert {name for name, _ in instructions} == INSTRUCTIONS
    (base,) = values(instructions, "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d", base)


def test_every_copied_file_exists_and_is_sent_to_the_builder(instructions: list[Instruction]) -> None:
    sources = [source for several, _ in copied(instructions) for source in several]
    assert [source for source in sources if not (ROOT / source).exists() or ignored(source)] == []
    assert ignored("tests") and ignored("runs") and ignored(".git") and ignored(".venv")


def test_the_environment_is_made_by_the_script_and_by_nothing_else(instructions: list[Instruction]) -> None:
    runs = values(instructions, "RUN")
    assert [run for run in runs if "scripts/environment" in run] == [
        "PIP_NO_CACHE_DIR=1 bash -c 'source scripts/environment'"
    ]
    assert not any(word in run for run in runs for word in ("pip install", "torch", "=="))


def test_the_image_runs_the_console_command_as_an_ordinary_user(instructions: list[Instruction]) -> None:
    (entry,) = values(instructions, "ENTRYPOINT")
    scripts = re.search(r"\[project\.scripts\]\n(\S+) =", (ROOT / "pyproject.toml").read_text())
    assert scripts is not None and json.loads(entry) == [scripts[1]]
    assert instructions.index(("USER", "qat")) > max(i for i, (name, _) in enumerate(instructions) if name == "RUN")
    assert "PATH=/opt/gpt-oss-qat/.venv/bin:$PATH" in values(instructions, "ENV")[0]
    assert values(instructions, "WORKDIR") == ["/opt/gpt-oss-qat", "/work"]


def test_the_files_before_the_environment_suffice_to_install_the_program(
    instructions: list[Instruction], tmp_path: Path
) -> None:
    """Build the program as pip does for scripts/environment. Then copy the rest, and run the program."""
    until = instructions.index(("RUN", ENVIRONMENT))
    _copy(instructions[:until], tmp_path)
    _run_python(tmp_path, "-m", "hatchling", "build", "--target", "wheel", "--directory", "built")
    _copy(instructions[until:], tmp_path)
    assert _run_python(tmp_path, "-m", "pipeline", "--help", "sft.learning_rate").startswith("sft.learning_rate\n")


def _run_python(directory: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _copy(instructions: list[Instruction], image: Path) -> None:
    for sources, destination in copied(instructions):
        for source in sources:
            into = image / destination / source if destination == "./" else image / destination
            into.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, dirs_exist_ok=True)
            else:
                shutil.copy(ROOT / source, into)
