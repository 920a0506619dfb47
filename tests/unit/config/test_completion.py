"""Tab completion: the candidates for a word, and real shells that complete a command line."""

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import run_program

from config.composing import RECIPES, ROOT, STAGES, Mistake, choices
from pipeline import __main__ as program
from pipeline.config import completion
from pipeline.config.descriptions import describe_settings

PROGRAM = "python -m pipeline"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][B0]?|\x07|\x08")


def texts(word: str, before: str = "") -> list[str]:
    return [each.text for each in completion.complete(word, program.FOLDERS, before)]


# --- candidates -------------------------------------------------------------------------------------------------------


def test_every_stage_recipe_and_choice_of_a_group_is_found() -> None:
    assert texts("stage=") == sorted(f"stage={name}" for name in STAGES)
    assert texts("recipe=") == [f"recipe={name}" for name in RECIPES]
    for choice in choices():
        assert choice in texts(f"{choice.partition('=')[0]}=")


def test_every_setting_is_reached_one_section_at_a_time() -> None:
    open_words, found = [""], set()
    while open_words:
        for text in texts(open_words.pop()):
            (open_words.append if text.endswith(".") else found.add)(text)
    settings = {each.key for each in describe_settings() if "[]" not in each.key}
    groups = {"train@sft", "train@qat", "eval", "model", "data", "format", "tracking"}
    assert found == {f"{key}=" for key in settings | groups}


WORDS = {
    "st": ["stage="],
    "sft.learning": ["sft.learning_rate="],
    "sft.lo": ["sft.logging_steps=", "sft.lora."],
    "sft.precision=": ["sft.precision=bf16", "sft.precision=fp32", "sft.precision=mixed_bf16"],
    "overwrite=tr": ["overwrite=true"],
    "overwrite=sft,q": ["overwrite=sft,qat", "overwrite=sft,quantize"],
    "upcast.experts=": ["upcast.experts=bf16", "upcast.experts=null", "upcast.experts=packed"],
    "format=mxfp4,nvfp4_": ["format=mxfp4,nvfp4_w4a4"],
    "sft.lora.targets=[attention,e": ["sft.lora.targets=[attention,experts"],
    "--ver": ["--version"],
    "run_dir=": [],
    "xyz": [],
    "xyz=": [],
}


@pytest.mark.parametrize(("word", "expected"), WORDS.items())
def test_a_word_is_completed(word: str, expected: list[str]) -> None:
    assert texts(word) == expected


def test_a_word_after_a_flag_is_completed_to_the_values_of_the_flag() -> None:
    assert texts("sf", before="--help") == ["sft", "sft."]
    assert texts("", before="--cfg") == ["all", "hydra", "job"]
    assert texts("install=b", before="-sc") == ["install=bash"]


def test_the_program_prints_candidates_with_their_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--shell-completion", "query=model.p") == 0
    text, meaning = capsys.readouterr().out.rstrip("\n").split("\t")
    assert text == "model.path=" and meaning.startswith("Checkpoint to start from")


def test_an_unknown_shell_is_refused(mistake: Mistake) -> None:
    message = mistake("-sc", "install=bahs")
    assert message.startswith("--shell-completion install=bahs: unknown. Did you mean 'bash'?")


def test_without_an_order_the_program_explains_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--shell-completion") == 0
    text = capsys.readouterr().out
    assert all(f"--shell-completion install={shell}" in text for shell in completion.SHELLS)


# --- shells -----------------------------------------------------------------------------------------------------------


COMMANDS = {"bash": ["bash", "--norc", "--noprofile"], "zsh": ["zsh", "-f"], "fish": ["fish", "--private"]}
PREPARATIONS = {
    "bash": ["bind 'set enable-bracketed-paste off'", f'eval "$({PROGRAM} --shell-completion install=bash)"'],
    "zsh": ["autoload -U compinit; compinit -u -D", f'eval "$({PROGRAM} --shell-completion install=zsh)"'],
    "fish": [f"{PROGRAM} --shell-completion install=fish | source"],
}


def environment() -> dict[str, str]:
    """Return an environment in which `python` is the interpreter of the tests."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT), "PATH": path}


class Terminal:
    """An interactive shell on a pseudo terminal, with our completion."""

    def __init__(self, shell: str, home: Path) -> None:
        self._own, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 250, 0, 0))  # shells break long lines
        self._process = subprocess.Popen(
            COMMANDS[shell],
            stdin=end,
            stdout=end,
            stderr=end,
            cwd=ROOT,
            env=environment() | {"HOME": str(home)},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # fish needs a controlling terminal
        )
        os.close(end)
        for line in PREPARATIONS[shell]:
            self.type(f"{line}\r")
        self.wait_until_ready()

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def read_until(self, wanted: str, seconds: float = 60.0) -> str:
        """Return the output up to `wanted`, or everything that came in time. Control sequences are left out."""
        read, end = b"", time.monotonic() + seconds
        while wanted not in (shown := _CONTROL.sub("", read.decode(errors="replace"))) and time.monotonic() < end:
            if select.select([self._own], [], [], 0.2)[0]:
                read += os.read(self._own, 1 << 16)
        return shown

    def wait_until_ready(self) -> None:
        """Wait until the shell has run everything that was typed."""
        self.type("echo rea''dy\r")  # the typed line is not the answer
        self.read_until("ready")

    def close(self) -> None:
        os.close(self._own)
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module", params=completion.SHELLS)
def terminal(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A shell that completes."""
    if shutil.which(request.param) is None:
        pytest.skip(f"needs the shell {request.param}")
    opened = Terminal(request.param, tmp_path_factory.mktemp("home"))
    yield opened
    opened.close()


LINES = {
    f"{PROGRAM} sta": "ge=",
    f"{PROGRAM} recipe=own": "_data",
    f"{PROGRAM} train@sft=lo": "ra",
    f"{PROGRAM} sft.learning_r": "ate=",
    f"{PROGRAM} format=mxfp4,nvfp4_": "w4a4",
    f"{PROGRAM} --help exp": "ort",
    f"{PROGRAM} --shell-completion  install=f": "ish",
    "scripts/launch stage=upc": "ast",
    "python scripts/bench_nume": "rics",
    f"{PROGRAM} run_dir={ROOT}/reci": "pes/",
}
"""A line as typed before the Tab key -> the text that the shell must add."""


@pytest.mark.parametrize(("line", "added"), LINES.items())
def test_a_shell_completes_a_line(terminal: Terminal, line: str, added: str) -> None:
    terminal.type(line)
    terminal.read_until(line)
    terminal.type("\t")
    assert added in terminal.read_until(added, seconds=20.0)
    terminal.type("\x15")  # deletes the line
    terminal.wait_until_ready()


def test_bash_forgets_the_completion() -> None:
    install, uninstall = (f'eval "$({PROGRAM} --shell-completion {verb}=bash)"' for verb in ("install", "uninstall"))
    script = f"{install}; complete -p python; {uninstall}; complete -p python; declare -F | grep gpt_oss_qat; true"
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert done.stdout == "complete -o bashdefault -o default -o nospace -F _gpt_oss_qat_python python\n"
    assert "python: no completion specification" in done.stderr
