"""The exports of a run, by name: `export` and `export/<target>`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Stage
from pipeline.config.targets import TARGETS
from pipeline.runs import parts, passing_over
from pipeline.runs.artifacts import Artifact, Kind, load
from pipeline.runs.commands import advise
from pipeline.runs.processes import on_main_process
from pipeline.runs.records import VerifyRecord
from pipeline.runs.run import Run
from pipeline.runs.up_to_date import say_if_needed

NAME = Stage.export.name


@dataclass(frozen=True)
class Export:
    """A complete export.

    Attributes:
        target: layout of the export, the name of its directory.
        artifact: its record.
        proof: artifact of the `verify` that passed on its files, or None.
    """

    target: str
    artifact: Artifact
    proof: Artifact | None

    @property
    def is_loadable(self) -> bool:
        """Whether transformers can load it."""
        return self.artifact.kind is not Kind.foreign

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(self.artifact.files.values())

    @property
    def proof_in_words(self) -> str:
        """Whether `verify` has passed, for tables."""
        if self.proof is None:
            return "no"
        record = self.proof.read(VerifyRecord)
        passed = sum(status == "ok" for status in record.checks.values())
        return f"yes: {passed} checks passed, {len(record.not_checked)} not possible"


def is_export(name: str) -> bool:
    """Whether a model's name means an export of the run: `export`, or `export/<target>`."""
    first, _, target = name.partition("/")
    return first == NAME and (target in TARGETS or not target)


def choose(run: Run) -> Run:
    """Return the run in which `export` means one export: the one that export.target names, else the last one.

    So the choice does not change if another export is made meanwhile. `export/` gets its links back if it holds copies.

    Raises:
        UserError: as `choose_to_verify` and `parts.restore_links`.
    """
    place = run.place(Stage.export)
    on_main_process(lambda: parts.restore_links(place))
    return choose_to_verify(run)


def choose_to_verify(run: Run) -> Run:
    """Choose as `choose`, but let `export/` have files that differ from those of the export. A check reports them.

    Raises:
        UserError: export.target is null and an export is unfinished.
    """
    place = run.place(Stage.export)
    if not run.is_complete(Stage.export):
        return run
    if run.asked_part is None:
        passing_over.raise_if_export_is_passed_over(run, run.part)
        if others := [name for name in parts.complete(place) if name != run.part]:
            taken = run.stage_dir(Stage.export)
            say_if_needed(run.stage.name, f"takes {taken}; export.target chooses another: {', '.join(others)}")
    return Run(run.config, run.part)


def require(run: Run) -> Artifact:
    """Return the export that `choose` chooses.

    Raises:
        UserError: as `choose` and `Run.require`.
    """
    return choose(run).require(Stage.export)


def directory_to_verify(run: Run) -> Path:
    """Return the directory of the chosen export. If files of `export/` replace some of its files, return `export/`.

    Users deploy `export/`, so such files have to be checked.

    Raises:
        UserError: as `Run.require`.
    """
    export = run.require(Stage.export, check_files=False)  # a check reports what is wrong with files
    place = run.place(Stage.export)
    return place if part_of(run, place) == run.part and parts.resolve(place) == place else export.directory


def find_stale(run: Run) -> dict[str, str]:
    """Find the complete exports whose model was rebuilt later: target -> message with the command that rebuilds it."""
    found = {each.target: run.staleness(each.artifact) for each in find_all(run.directory)}
    return {target: message for target, message in found.items() if message is not None}


def find_all(run_directory: Path) -> list[Export]:
    """Find the complete exports of a run, in the order of TARGETS. Files are not checked."""
    there = parts.complete(run_directory / NAME)
    proofs = [load(each, check_files=False) for each in parts.complete(run_directory / Stage.verify.name).values()]
    found = []
    for target in _ordered(there):
        artifact = load(there[target], check_files=False)
        found.append(Export(target, artifact, _proof_of(artifact, proofs)))
    return found


def by_name(run_directory: Path) -> dict[str, Export]:
    """Return the complete exports by their names in reports.

    One has the name `export`: the first in the order of TARGETS that transformers can load, or the first of all. So a
    further export does not change the meaning of an earlier report. The others have the name `export/<target>`.
    """
    there = sorted(find_all(run_directory), key=lambda each: not each.is_loadable)
    return {f"{NAME}/{each.target}" if i else NAME: each for i, each in enumerate(there)}


def name_of(run: Run, directory: Path) -> str | None:
    """Return the name in reports of an export of this run, or None for any other directory."""
    target = part_of(run, directory)
    return next((name for name, each in by_name(run.directory).items() if each.target == target), None)


def part_of(run: Run, directory: Path) -> str | None:
    """Return the target of an export of this run, or None for any other directory."""
    place = run.place(Stage.export)
    if directory.resolve() == place.resolve():
        return parts.find_shown(place)
    there = {path.resolve(): target for target, path in parts.complete(place).items()}
    return there.get(directory.resolve())


def find_proof(run: Run, export: Artifact) -> Artifact | None:
    """Return the artifact of the `verify` that passed on this export, or None. A failed `verify` leaves no artifact.

    Other proofs are read only if the export's own directory in `verify/` has none.
    """
    there = parts.complete(run.place(Stage.verify))
    own = there.pop(part_of(run, export.directory) or "", None)
    directories = [*([own] if own else []), *there.values()]
    proof = _proof_of(export, (load(each, check_files=False) for each in directories))
    return None if proof is None else load(proof.directory)


def missing_proof(run: Run, export: Artifact) -> str:
    """Return the message for an export that `verify` has not passed."""
    target = part_of(run, export.directory)
    command = run.command(Stage.verify, *([f"export.target={target}"] if target else []))
    return f"{export.directory}: has not passed stage=verify. {advise(command)}"


def _proof_of(export: Artifact, proofs: Iterable[Artifact]) -> Artifact | None:
    return next((proof for proof in proofs if proof.parents["checkpoint"] == export.fingerprint), None)


def _ordered(names: Iterable[str]) -> list[str]:
    order = list(TARGETS)
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))
