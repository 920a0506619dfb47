"""Real shells complete a command line of the program."""

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
from forks import ROOT

from pipeline.config import completion

PROGRAM = "python -m pipeline"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][B0]?|\x07|\x08")


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
    assert added in terminal.read_until(added)
    terminal.type("\x15")  # deletes the line
    terminal.wait_until_ready()


def test_bash_forgets_the_completion() -> None:
    install, uninstall = (f'eval "$({PROGRAM} --shell-completion {verb}=bash)"' for verb in ("install", "uninstall"))
    script = f"{install}; complete -p python; {uninstall}; complete -p python; declare -F | grep gpt_oss_qat; true"
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert done.stdout == "complete -o bashdefault -o default -o nospace -F _gpt_oss_qat_python python\n"
    assert "python: no completion specification" in done.stderr
