"""Recognize the stages that the present launch has built.

A launcher that restarts its processes repeats the whole command, also its `overwrite=`. So artifact.json and
unfinished.json name the launch that wrote them, and `overwrite` never rebuilds a result of its own launch.

A launch is one command with all its restarts. The variable `GPT_OSS_QAT_LAUNCH` names it, if it is set. Otherwise the
agent of torchrun or `accelerate launch` names it: the process that starts the others, and starts them again. Without
an agent, every command is a launch of its own.
"""

import os
import uuid
from pathlib import Path

import xxhash

from pipeline.runs.json_files import read_record
from pipeline.runs.processes import main_process_value

VARIABLE = "GPT_OSS_QAT_LAUNCH"
KEY = "launch"
"""Key of the launch in artifact.json and unfinished.json."""

_OF_AGENTS = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun and `accelerate launch` set. Their restart count is no help: only the node that failed counts
its restarts, and the main process may be on another node."""
_START_TIME = 19  # index in /proc/<pid>/stat, behind the name of the program
_LENGTH = 12

_calls = 0
_present: str | None = None


def begin() -> None:
    """Begin a command. The second command of a process is another launch than the first, also after a restart."""
    global _calls, _present
    _calls += 1
    name = os.environ.get(VARIABLE) or _agent() or uuid.uuid4().hex[:_LENGTH]
    _present = name if _calls == 1 else f"{name}.{_calls}"


def forget() -> None:
    """Forget the launch of an earlier call in the same process."""
    global _present
    _present = None


def agree() -> None:
    """Let all processes have the main process's launch. Each machine has an agent of its own."""
    global _present
    _present = main_process_value(_present)


def present() -> str | None:
    """Return the name of the present launch. It is None if code uses the stages without a command."""
    return _present


def has_written(record: Path) -> bool:
    """Return whether the present launch has written this artifact.json or unfinished.json."""
    try:
        return _present is not None and read_record(record).get(KEY) == _present
    except (OSError, ValueError, RecursionError):
        return False  # missing or damaged


def prefix() -> str:
    """Return the assignment that lets a further command belong to the present launch."""
    return f"{VARIABLE}={_present} "


def note() -> dict[str, object]:
    """Return the entry for artifact.json and unfinished.json."""
    return {KEY: _present}


def _agent() -> str | None:
    """Name the agent by its process id and its start. Return None without an agent, or if /proc does not show it.

    Only the processes that an agent starts have its variable, and not the agent. If the parent has it too, the parent
    is a program that an agent has started. Its commands are launches of their own.
    """
    if _OF_AGENTS not in os.environ:
        return None
    number, own = os.getppid(), f"{_OF_AGENTS}={os.environ[_OF_AGENTS]}".encode()
    try:
        is_inherited = own in Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        started = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[_START_TIME]
    except OSError:
        return None
    if is_inherited:
        return None
    return xxhash.xxh3_128_hexdigest(f"{os.environ[_OF_AGENTS]} {boot} {number} {started}".encode())[:_LENGTH]
