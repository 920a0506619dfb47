"""An engine that is older than an export needs is named before it starts. Of an unknown version nothing is said."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.config.engines import SERVERS
from pipeline.serve import versions

VLLM = SERVERS["vllm"]


def program_of(directory: Path, printed: str) -> Path:
    """Make a program whose interpreter prints the version of its package, as Python does for an installed one."""
    python = directory / "python3"
    python.write_text(f"#!/bin/sh\n{printed}\n")
    program = directory / "vllm"
    program.write_text(f"#!{python}\nimport vllm\n")
    for each in (python, program):
        each.chmod(0o755)
    return program


@pytest.mark.parametrize("target", ["mxfp4", "bf16"])
def test_a_version_without_gpt_oss_is_named_with_the_version_that_is_needed(tmp_path: Path, target: str) -> None:
    program = program_of(tmp_path, "echo 0.9.2")
    assert versions.describe_problem(program, VLLM, target) == (
        f"{program} is version 0.9.2, which cannot load gpt-oss with export.target={target}. It needs 0.10.1 or newer:"
        " pip install vllm."
    )


def test_a_version_whose_prompts_were_not_trained_is_named(tmp_path: Path) -> None:
    problem = versions.describe_problem(program_of(tmp_path, "echo 0.16.0"), VLLM, "mxfp4")
    assert problem is not None and "chat prompts differ from those of training. Use 0.17 or newer" in problem


@pytest.mark.parametrize(
    "printed", ["echo 0.17.0", "echo 0.32.0", "echo 0.10.1.dev3+gab12", "echo x", "true", "exit 1"]
)
def test_nothing_is_said_of_a_new_or_unknown_version(tmp_path: Path, printed: str) -> None:
    assert versions.describe_problem(program_of(tmp_path, printed), VLLM, "mxfp4") is None


def test_nothing_is_said_of_a_program_that_names_no_interpreter(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    for text in ("#!/usr/bin/env python3\n", "#!/bin/sh\nexec docker run vllm\n", ""):
        program.write_text(text)
        assert versions.find(program, VLLM.distributions) is None
    assert versions.find(tmp_path / "missing", VLLM.distributions) is None


@pytest.mark.parametrize("head", ["#!{python}\n", '#!/bin/sh\n\'\'\'exec\' "{python}" "$0" "$@"\n'])
def test_the_interpreter_of_the_program_is_asked(tmp_path: Path, head: str) -> None:
    program = tmp_path / "pytest"
    program.write_text(head.format(python=sys.executable))
    assert versions.find(program, ("no-such-package", "pytest")) == version("pytest")
