"""Runs the steps, and keeps their figures in the results file, so that a second run continues."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.full_shape import outcomes, processes
from scripts.full_shape.plan import BASE, RUNS, RunPlan, Step, steps_of
from scripts.full_shape.processes import Ended
from scripts.recording import name_processor

Start = Callable[[tuple[str, ...], Path, Path], Ended]
"""Function that runs a command, as `processes.run` does."""


class StepFailed(Exception):
    """A step ended with another status than 0."""


class Demonstration:
    """The steps on one random checkpoint, and their results.

    Args:
        shape: name of the checkpoint's shape.
        directory: directory of the checkpoint, the runs and the logs.
        results: results file.
        make_base: arguments of Python that make the checkpoint.
        root: root of the repository.
        start: runs a step.

    Raises:
        ValueError: the results file has another shape's results.
    """

    def __init__(
        self,
        shape: str,
        directory: Path,
        results: Path,
        make_base: tuple[str, ...],
        root: Path,
        start: Start = processes.run,
    ) -> None:
        self._directory, self._results, self._root, self._start = directory, results, root, start
        self._base = Step(BASE, "make", make_base)
        self._record: dict[str, Any] = {"shape": shape, "environment": {}, "steps": {}}
        if results.is_file():
            self._record = json.loads(results.read_text(encoding="utf-8"))
            if self._record["shape"] != shape:
                raise ValueError(f"{results}: has the results of --shape {self._record['shape']}")

    def run(self, names: list[str]) -> None:
        """Make the checkpoint, and run all steps of the named runs that have no result.

        The files of a run are removed when the run is complete.

        Raises:
            StepFailed: a step failed. The next call repeats it.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        if not (self._directory / BASE).is_dir():
            self._take(self._base, self._directory / BASE)
        for run in RUNS:
            if run.name in names and not self._is_complete(run):
                for step in steps_of(run, self._directory):
                    if not self._is_done(step):
                        self._take(step, self._directory / run.name / step.stage)
                shutil.rmtree(self._directory / run.name)

    def _is_complete(self, run: RunPlan) -> bool:
        return all(self._is_done(step) for step in steps_of(run, self._directory))

    def _is_done(self, step: Step) -> bool:
        return self._record["steps"].get(step.name, {}).get("status") == 0

    def _take(self, step: Step, made: Path) -> None:
        """Run one step. A step that was interrupted adds its time to the time before the interruption."""
        before = self._record["steps"].get(
            step.name, {"attempts": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0}
        )
        attempts = {**before, "attempts": before["attempts"] + 1, "status": None, "command": self._shown(step.command)}
        self._store(step, attempts)  # an attempt that is killed together with this script counts as well
        print(f"{step.name} ...", flush=True)
        log = self._directory / f"{step.run}-{step.stage}.log"
        ended = self._start(step.command, self._root, log)
        found = {
            **attempts,
            "status": ended.status,
            "seconds": round(before["seconds"] + ended.seconds, 1),
            "cpu_seconds": round(before["cpu_seconds"] + ended.cpu_seconds, 1),
            "peak_bytes": max(before["peak_bytes"], ended.peak_bytes),
        }
        if ended.status == 0:
            found |= self._result(step, made)
        self._store(step, found)
        print(
            f"{step.name}: {ended.seconds:.0f} s, {ended.peak_bytes / 2**30:.2f} GiB, status {ended.status}", flush=True
        )
        if ended.status:
            raise StepFailed(f"{step.name} ended with status {ended.status}. Its output: {log}")

    def _result(self, step: Step, made: Path) -> dict[str, Any]:
        if step is self._base:
            return {"result": {"file_bytes": sum(path.stat().st_size for path in made.iterdir())}}
        known = outcomes.environment(made)
        self._record["environment"] = {**_machine(), **{key: known[key] for key in ("python", "device", "libraries")}}
        return {"commit": known["git_commit"], "result": outcomes.read(step.stage, made)}

    def _shown(self, command: tuple[str, ...]) -> str:
        """Return the command as the results show it, without this machine's paths."""
        prefixes = (f"{self._directory}{os.sep}", f"{self._root}{os.sep}")
        words = [word.replace(prefixes[0], "").replace(prefixes[1], "") for word in command]
        return " ".join(["python", *(Path(word).name if Path(word).is_absolute() else word for word in words)])

    def _store(self, step: Step, found: Mapping[str, Any]) -> None:
        self._record["steps"][step.name] = dict(found)
        temporary = self._results.with_name(self._results.name + ".tmp")
        temporary.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._results)


def _machine() -> dict[str, Any]:
    """Describe the CPU and the memory of this machine."""
    return {
        "cpu": name_processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }
