"""Compiles the injector, and runs the program with a disturbed change."""

import json
import platform
import shutil
import subprocess
from dataclasses import dataclass
from enum import Enum
from errno import EDQUOT, EIO, ENOSPC
from functools import cached_property
from pathlib import Path

import disk
import forks

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") if (platform.system(), platform.machine()) == ("Linux", "x86_64") else None
"""The C compiler, or None if there is none. The injector is written for Linux on x86-64."""
_NOTHING, _KILL, _TEAR, _FAIL = range(4)  # as in injector.c
_SECONDS = 300


class Kind(Enum):
    """What happens at a change below the run directory. The value says it in words."""

    kill = "killed"
    tear = "killed after half of the write"
    cut = "power cut, names kept"
    forgetful_cut = "power cut, names lost"
    enospc = "disk full"
    edquot = "quota exceeded"
    eio = "I/O error"

    @property
    def is_error(self) -> bool:
        """Whether the program gets an error, and goes on."""
        return self in _ERRORS


_ERRORS = {Kind.enospc: ENOSPC, Kind.edquot: EDQUOT, Kind.eio: EIO}
_NEED_SPACE = ("write", "create", "mkdir", "link")


@dataclass(frozen=True)
class Change:
    """A change of a run directory, as the journal of an undisturbed run lists it."""

    number: int
    operation: str
    path: str

    def can_meet(self, kind: Kind) -> bool:
        """Whether a fault of this kind can happen at this change."""
        if kind is Kind.tear:
            return self.operation == "write"
        return self.operation in _NEED_SPACE if kind in (Kind.enospc, Kind.edquot) else True


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit status, its output, and whether the fault has happened."""

    status: int
    output: str
    was_disturbed: bool = False


class Injector:
    """Runs commands on one run directory, below a working directory of its own."""

    def __init__(self, work: Path) -> None:
        """Compile the library, unless it is there, and make the working directory."""
        assert COMPILER is not None
        self.work = work
        self.run_dir = work / "run"
        work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def _python(self) -> list[str]:
        library = self.work / "injector.so"
        source = HERE / "injector.c"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-lpthread", "-ldl"], check=True)
        return forks.interpreter("program", preload=library)

    def run(
        self, arguments: tuple[str, ...], kind: Kind | None = None, at: int = 0, processes: int = 1, rank: int = 0
    ) -> Ended:
        """Run a command with run_dir=`run_dir`, and disturb change number `at` of one process.

        After a power cut, the run directory is as the disk has it.
        """
        before, journal, copies = self.work / "before", self.work / "journal", self.work / "copies"
        for path in (before, copies):
            shutil.rmtree(path, ignore_errors=True)
        self.run_dir.mkdir(exist_ok=True)
        shutil.copytree(self.run_dir, before, symlinks=True)
        copies.mkdir()
        journal.write_bytes(b"")
        order = {
            "directory": str(self.run_dir),
            "journal": str(journal),
            "copies": str(copies),
            "fault": _NOTHING if kind is None else _FAIL if kind.is_error else _TEAR if kind is Kind.tear else _KILL,
            "at": at,
            "error": _ERRORS.get(kind, 0) if kind is not None else 0,
            "lasting": kind in (Kind.enospc, Kind.edquot),
            "rank": rank,
        }
        command = [str(HERE / "disturbed.py"), json.dumps(order), *arguments, f"run_dir={self.run_dir}"]
        ended = self._start(command, processes)
        if kind in (Kind.cut, Kind.forgetful_cut):
            tree = disk.read_tree(before)
            disk.replay(tree, journal, copies)
            disk.write_tree(tree, self.run_dir, names_kept=kind is Kind.cut)
        has_failed = any(change.operation == "failed" for change in self.changes())
        return Ended(ended.status, ended.output, has_failed if kind and kind.is_error else ended.status == 137)

    def _start(self, command: list[str], processes: int) -> Ended:
        if processes > 1:
            group = forks.run_processes(*command, processes=processes, python=self._python)
            return Ended(group.returncode, group.stdout)
        try:
            one = subprocess.run(
                [*self._python, *command],
                env=self._environment(),
                cwd=self.work,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return Ended(124, f"no end after {_SECONDS} s")
        return Ended(one.returncode, one.stderr)

    def _environment(self) -> dict[str, str]:
        """Return the environment of commands. Programs that they start need the library, too (see injector.c)."""
        return {**forks.environment(), "LD_PRELOAD": str(self.work / "injector.so")}

    def changes(self) -> list[Change]:
        """Return the changes that the last command made or tried to make."""
        lines = (self.work / "journal").read_text(encoding="utf-8").splitlines()
        return [Change(int(number), *rest[:2]) for number, *rest in (line.split("\t") for line in lines)]

    def tree(self) -> disk.Directory:
        """Return the run directory after the last command, computed from the journal."""
        tree = disk.read_tree(self.work / "before")
        disk.replay(tree, self.work / "journal", self.work / "copies")
        return tree

    def restore(self, directory: Path | None) -> None:
        """Make the run directory a copy of another one, or remove it."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        if directory is not None:
            shutil.copytree(directory, self.run_dir, symlinks=True)
