"""Disturbs a command, runs the same command again, and judges the result."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from injector import Change, Ended, Injector, Kind
from scenarios import BASE, Scenario, base_arguments, copied

from pipeline.runs.artifacts import ARTIFACT_FILE, CONFIG_FILE

_TIMES = re.compile(r"second|runtime|_per_|duration|time|memory|peak|rate_of_disk|free")
"""Names of figures that differ between two undisturbed runs: times, and the state of the machine."""
_COMPARED_OF_ARTIFACT = ("stage", "kind", "format", "fake_quantized", "scale_rule", "fingerprint", "files", "details")
IS_WORK = re.compile(r"/(unfinished|shards)\.json$|/checkpoints/")
"""Files for an unfinished stage. They may be left beside artifact.json, until the same command runs again."""
_LOST_CONNECTION = re.compile(r"error( on process \d+)?: the connection to another process was lost\.")
_ADVICE = re.compile(r"(?<!without )overwrite=true")


class Outcome(Enum):
    """How a fault ended."""

    identical = "identical"
    refused = "refused"
    lost = "lost"
    missed = "missed"


@dataclass(frozen=True)
class Fault:
    """A fault: the scenario's name, its kind, and the change that it meets."""

    scenario: str
    kind: Kind
    change: Change

    @property
    def name(self) -> str:
        """The fault in words, unique."""
        return f"{self.scenario}: {self.kind.value} at change {self.change.number}"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a fault. `why` explains what was lost."""

    outcome: Outcome
    why: str = ""


class Bench:
    """Prepares scenarios, and judges faults, in a working directory. Prepared runs are kept there."""

    def __init__(self, work: Path, bases: Path) -> None:
        """Use a working directory for commands, and another one for the runs in which scenarios start."""
        self.injector = Injector(work)
        self._bases = bases
        self._prepared = work / "prepared"
        self._expected: dict[str, dict[str, bytes]] = {}
        self._changes: dict[str, list[Change]] = {}

    def known_changes(self, scenario: Scenario) -> list[Change]:
        """Return what `changes` returned before. The command runs only if it did not run before."""
        return self._changes[scenario.name] if scenario.name in self._changes else self.changes(scenario)

    def changes(self, scenario: Scenario) -> list[Change]:
        """Run the command undisturbed, keep the result for comparisons, and return the changes that it makes.

        Many changes that follow one another have the same operation and file. They are listed once, and the last, too.
        """
        self.start(scenario)
        ended = self.injector.run(scenario.arguments, processes=scenario.processes, rank=scenario.rank)
        assert ended.status == 0, ended.output
        self._expected[scenario.name] = contents(self.injector.run_dir, scenario)
        changes = self.injector.changes()
        self._changes[scenario.name] = [
            change
            for index, change in enumerate(changes)
            if not 0 < index < len(changes) - 1
            or {(c.operation, c.path) for c in changes[index - 1 : index + 2]} != {(change.operation, change.path)}
        ]
        return self._changes[scenario.name]

    def judge(self, scenario: Scenario, fault: Fault) -> Verdict:
        """Disturb the command, run it again, and compare with the undisturbed run."""
        self.known_changes(scenario)
        self.start(scenario)
        group = {"processes": scenario.processes, "rank": scenario.rank}
        first = self.injector.run(scenario.arguments, fault.kind, fault.change.number, **group)
        if not first.was_disturbed:
            return Verdict(Outcome.missed)
        if (wrong := self._find_wrong(first, fault.kind, scenario)) is not None:
            return Verdict(Outcome.lost, f"after the fault: {wrong}")
        again = self.injector.run(scenario.arguments, processes=scenario.processes)
        return self._judge_repeated(scenario, again)

    def _find_wrong(self, ended: Ended, kind: Kind, scenario: Scenario) -> str | None:
        """Say what is wrong after a fault, before the command is repeated."""
        if kind.is_error and ended.status != 0 and not _is_clean(ended):
            return f"status {ended.status}\n{ended.output}"
        directory = self.injector.run_dir / scenario.stage
        is_complete = (directory / ARTIFACT_FILE).is_file()
        if kind.is_error and ended.status == 0 and not any(directory.rglob(ARTIFACT_FILE)):
            return "status 0, but the stage is not complete"
        was_complete = bool(scenario.settings_before)
        return self.differences(scenario, IS_WORK) if is_complete and not was_complete else None

    def _judge_repeated(self, scenario: Scenario, again: Ended) -> Verdict:
        outcome, advice = Outcome.identical, ""
        if again.status != 0 and _is_clean(again) and _ADVICE.search(again.output):
            outcome, advice = Outcome.refused, again.output
            again = self.injector.run((*scenario.arguments, "overwrite=true"), processes=scenario.processes)
        if again.status != 0:
            return Verdict(Outcome.lost, f"{advice}when repeated: status {again.status}\n{again.output}")
        wrong = self.differences(scenario)
        return Verdict(outcome, advice) if wrong is None else Verdict(Outcome.lost, f"when repeated: {wrong}")

    def differences(self, scenario: Scenario, ignored: re.Pattern[str] | None = None) -> str | None:
        """Compare the run directory with the undisturbed run's. Return None if they are equal.

        Further files whose names match `ignored` may be there.
        """
        found, expected = contents(self.injector.run_dir, scenario), self._expected[scenario.name]
        found = {name: content for name, content in found.items() if ignored is None or not ignored.search(name)}
        missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        changed = [name for name in expected if name in found and found[name] != expected[name]]
        lists = {"missing": missing, "more": more, "different": changed}
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in lists.items() if names) or None

    def start(self, scenario: Scenario) -> None:
        """Put the run directory into the state in which the command starts."""
        self.injector.restore(self._prepare(scenario))

    def _prepare(self, scenario: Scenario) -> Path | None:
        base = self._base(scenario) if scenario.needs else None
        if base is None and not scenario.settings_before:
            return None
        prepared = self._prepared / re.sub(r"\W+", "-", scenario.name)
        if not prepared.is_dir():
            shutil.rmtree(self.injector.run_dir, ignore_errors=True)
            for directory in copied(base, scenario) if base is not None else ():
                shutil.copytree(directory, self.injector.run_dir / directory.name, symlinks=True)
            if scenario.settings_before:
                self._run(scenario.arguments_before)
            self._prepared.mkdir(exist_ok=True)
            self.injector.run_dir.rename(prepared)
        return prepared

    def _base(self, scenario: Scenario) -> Path:
        """Return a run with the stages that a scenario needs. Scenarios of a method share it, and add stages to it."""
        base = self._bases / scenario.method
        needed = BASE[: BASE.index(scenario.needs[-1]) + 1]
        if lacking := [stage for stage in needed if not (base / stage).is_dir()]:
            self.injector.restore(base if base.is_dir() else None)
            for stage in lacking:
                self._run(base_arguments(scenario.method, stage))
            shutil.rmtree(base, ignore_errors=True)
            self._bases.mkdir(parents=True, exist_ok=True)
            self.injector.run_dir.rename(base)
        return base

    def _run(self, arguments: tuple[str, ...]) -> None:
        ended = self.injector.run(arguments)
        assert ended.status == 0, ended.output


def _is_clean(ended: Ended) -> bool:
    """Whether a command ended with one message, as a mistake of the user or a failure of the machine does.

    Another process of the group may also say that it lost the connection. It cannot know whether the first one spoke.
    """
    messages = re.findall(r"^error\b.*", ended.output, re.MULTILINE)
    causes = [message for message in messages if not _LOST_CONNECTION.match(message)]
    return ended.status in (1, 2) and len(causes or messages) == 1 and "Traceback" not in ended.output


def contents(run_dir: Path, scenario: Scenario) -> dict[str, bytes]:
    """Return the files of a run by path, without times.

    These are all files of the scenario's stage, and the files of the stages and the source that it needs. `data` and
    `predictions` are caches, which a later command completes.
    """
    compared = [*scenario.needs, "source", scenario.stage]
    files = [
        path
        for name in compared
        for path in (run_dir / name).rglob("*")
        if path.is_file() and path.name != CONFIG_FILE and (name == scenario.stage or ".tmp" not in str(path))
    ]
    return {path.relative_to(run_dir).as_posix(): _canonical(path) for path in files}


def _canonical(path: Path) -> bytes:
    """Return the contents of a file. JSON has no times and only the promised fields."""
    content = path.read_bytes()
    try:
        if path.name == ARTIFACT_FILE:
            record = json.loads(content)
            return _dumped({key: record[key] for key in _COMPARED_OF_ARTIFACT if key in record})
        if path.suffix == ".json":
            return _dumped(json.loads(content))
        if path.suffix == ".jsonl":
            return b"\n".join(_dumped(json.loads(line)) for line in content.splitlines())
    except ValueError:
        return content
    return content


def _dumped(value: Any) -> bytes:
    return json.dumps(_without_times(value), sort_keys=True).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not _TIMES.search(key)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def faults_of(scenario: Scenario, changes: list[Change]) -> list[Fault]:
    """List all faults of a scenario. Two processes have no common order of changes, so they meet no power cuts."""
    kinds = [kind for kind in Kind if scenario.processes == 1 or kind not in (Kind.cut, Kind.forgetful_cut)]
    return [Fault(scenario.name, kind, change) for change in changes for kind in kinds if change.can_meet(kind)]


def to_json(fault: Fault, verdict: Verdict) -> dict[str, Any]:
    """Return a fault and its outcome as plain values."""
    return {
        "scenario": fault.scenario,
        "kind": fault.kind.name,
        **asdict(fault.change),
        "outcome": verdict.outcome.name,
        "why": verdict.why,
    }
