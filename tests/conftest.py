"""Functions that run the program in this process, and shared fixtures such as finished runs and a chat server."""

import fcntl
import gc
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from allowed_skips import pytest_sessionfinish, pytest_terminal_summary  # noqa: F401 - hooks
from chat_server import Server
from composing import composed_once, composed_quickly
from fork_server import skip_syncs
from shared_tables import share_tables

# More threads would slow down work on such small tensors. torch reads OMP_NUM_THREADS at import, so set it first.
# Processes that tests start inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Let torch trust the instruction sets that the processor lists. Otherwise it tests each set in a new Python process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import forks

from pipeline import __main__ as program
from pipeline.runs import present

VOCABULARY = Path(__file__).parents[2] / "shared" / "data" / "tokenizer"
"""openai-harmony's vocabulary. It is not part of the project, and is used only if it lies beside the checkout."""
if VOCABULARY.is_dir():
    os.environ.setdefault("TIKTOKEN_ENCODINGS_BASE", str(VOCABULARY))

SHORT = (
    "data.max_samples=80",
    "sft.learning_rate=3e-3",
    "qat.learning_rate=5e-4",
    "sft.max_steps=12",
    "sft.eval_steps=6",
    "sft.save_steps=6",
    "sft.logging_steps=2",
    "qat.max_steps=6",
    "qat.eval_steps=3",
    "qat.save_steps=3",
    "qat.logging_steps=2",
    "verify.samples=2",
)
"""Settings that shorten the smoke recipe to seconds."""

_NUMBERS = itertools.count()
"""Numbers of the directories that tests get from `tmp_path`."""

ONE_LAYER = ("sft.lora.layers=[1]", "qat.lora.layers=[1]")
"""Settings that `lora_run` adds to SHORT."""


def pytest_configure() -> None:
    """Let the processes of pytest-xdist share the servers for forks. Collect garbage rarely, and not during imports."""
    gc.disable()
    gc.set_threshold(20_000, 20, 50)  # stages collect garbage themselves when they need it
    if "PYTEST_XDIST_WORKER" not in os.environ:
        forks.share()


def pytest_collection_finish() -> None:
    """Spare also the tests that do not run the program."""
    spare_imports()
    gc.enable()


def pytest_unconfigure() -> None:
    """Collect garbage once. pytest then does so five times, but finds little to visit."""
    spare_imports()


def run_program(*arguments: str) -> int:
    """Run `python -m pipeline arguments…` in this process, and return its exit status."""
    before = sys.argv
    sys.argv = ["pipeline", *arguments]
    spare_imports()
    try:
        with composed_once(arguments):
            return program.status(list(arguments))
    finally:
        sys.argv = before


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the only message of a run that must end with status 2."""
    capsys.readouterr()
    assert run_program(*arguments) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "Traceback" not in message, message
    return message


@cache
def _freeze(_: int) -> None:
    gc.collect()
    gc.freeze()


def spare_imports() -> None:
    """Let garbage collections skip the objects that libraries have made so far.

    There are a million such objects, and they live as long as the process. A stage collects garbage after its last use
    of a model. Visiting these objects would take a third of the time of a stage with a tiny model.
    """
    _freeze(len(sys.modules))


def quantized_runs(
    cases: Mapping[str, tuple[str, ...]], smoke_run: Path, lora_run: Path, factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, tuple[str, ...]]]:
    """Return a function that returns the run directory and the settings of a case. The stage `quantize` has run."""
    made: dict[str, Path] = {}

    def make(case: str) -> tuple[Path, tuple[str, ...]]:
        if case not in made:
            source = lora_run if case.startswith("lora") else smoke_run
            run = linked(factory.mktemp(case) / "run", source, "source", "upcast", "sft")
            assert run_program("stage=quantize", f"run_dir={run}", *cases[case]) == 0
            made[case] = run
        return made[case], cases[case]

    return make


def _run_of_all_processes(recipe: str, *settings: str) -> Path:
    """Run all stages of a recipe once for all processes of the tests, and return the run directory."""
    directory = Path(forks.shared_directory(), recipe)
    directory.mkdir(exist_ok=True)
    run_dir, made = directory / "run", directory / "made"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            assert run_program("stage=all", f"recipe={recipe}", f"run_dir={run_dir}", *settings) == 0
            made.touch()
    return run_dir


def linked(run_dir: Path, source: Path, *stages: str) -> Path:
    """Make a run directory with links to `stages` of the run `source`. Tests must not write to these stages."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (run_dir / stage).symlink_to(source / stage)
    return run_dir


def outcomes(run_dir: Path) -> set[str]:
    """Return the statuses of the checks in a run's `verify` report. The optional check by engines is left out."""
    report = json.loads((run_dir / "verify" / "report.json").read_text(encoding="utf-8"))
    return {check["status"] for check in report["checks"] if check["title"] != "engines"}


@pytest.fixture(scope="session", autouse=True)
def quick_composition() -> Iterator[None]:
    """Calls of the library, and functions that compose a configuration, are as quick as `run_program`."""
    with composed_quickly():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_disk() -> Iterator[None]:
    """Files are not synced. Tests that check syncs replace os.fsync, and tests/faults runs commands that sync."""
    with pytest.MonkeyPatch.context() as patched:
        skip_syncs(patched.setattr)
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_tables() -> Iterator[None]:
    """Runs of this process, and of commands that it starts, share large tables of rows."""
    with pytest.MonkeyPatch.context() as patched:
        share_tables(patched.setattr, forks.shared_directory())
        yield


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the directories of all tests."""
    return tmp_path_factory.mktemp("tests")


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, directories: Path) -> Path:
    """A new directory. To find a free number, pytest's own fixture lists the directories of all earlier tests."""
    made = directories / f"{re.sub(r'[^A-Za-z0-9]', '_', request.node.name):.30}_{next(_NUMBERS)}"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture(autouse=True)
def no_command() -> None:
    """A test does not meet the command of an earlier test."""
    present.forget()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model. Tests must not write to it."""
    from pipeline.config import TinyConfig
    from pipeline.models.tiny_model import create_tiny

    directory: Path = tmp_path_factory.mktemp("tiny") / "model"
    create_tiny(directory, TinyConfig())
    return directory


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="session")
def smoke_run() -> Path:
    """A run directory in which all stages of recipe=smoke have run, with few steps. Tests must not write to it."""
    return _run_of_all_processes("smoke", *SHORT)


@pytest.fixture(scope="session")
def lora_run() -> Path:
    """A run directory of recipe=smoke_lora with adapters on layer 1 alone. Tests must not write to it."""
    return _run_of_all_processes("smoke_lora", *SHORT, *ONE_LAYER)


@pytest.fixture
def run_dir(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of the smoke run, which a test may change."""
    return Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change into a new directory, because tests with the same relative run_dir would share tables."""
    import datasets

    datasets.disable_progress_bars()
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of a tiny model."""
    from transformers import AutoTokenizer

    from pipeline.config import TinyConfig
    from pipeline.models import tiny_model

    directory = tmp_path_factory.mktemp("tokenizer") / "tiny"
    tiny_model.create_tiny(directory, TinyConfig())
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A chat server. Requests bypass the proxy of this machine."""
    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as made:
        yield made
