"""A run: the directories of its stages, and their state.

Code that reads or writes stages gets a `Run`, not the whole configuration.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import DEFAULT_TARGET, PipelineConfig, QuantizeSource, Stage, rebuilds
from pipeline.config.controls import is_control
from pipeline.config.overrides import assignment, by_key
from pipeline.config.secrets import without_secrets
from pipeline.errors import UserError
from pipeline.runs import absent_runs, launches, own_settings, parts, places
from pipeline.runs.artifacts import (
    ARTIFACT_FILE,
    ARTIFACT_VERSION,
    MODEL_STAGES,
    UNFINISHED_FILE,
    Artifact,
    Kind,
    load,
    raise_if_newer,
)
from pipeline.runs.commands import advise, asked, locate, rebuild_command, run_command
from pipeline.runs.json_files import read_record, seal, write_json
from pipeline.runs.paths import absolute
from pipeline.runs.records import ExportRecord
from pipeline.runs.settings import Settings, choose_settings

BEING_EMPTIED: dict[str, Any] = {"is_being_emptied": True, "settings": {}, "parents": {}, "data": None}
"""Contents of unfinished.json while a stage's directory is emptied. The directory then has nothing to resume."""
SOURCE_DIR, DATA_DIR, PREDICTIONS_DIR = "source", "data", "predictions"
"""Directories of a run that belong to no stage: a synthetic source, tables of data, and predictions of the reference.

The predictions are safe to delete.
"""
_EXPORT_SOURCE, _START_PATH = "export.source", "sft.start"
START = "start"
"""Name of the parent that is the model in `sft.start`."""


class Run:
    """A run: its directory, and the settings of its stages.

    Attributes:
        config: the resolved configuration, for config.yaml and trackers. Other code takes the sections that it needs.
        stage: the stage that the user asked for.
        recipe: name of the recipe.
        directory: directory of the run.
        overwrite: whether to rebuild a complete stage. It is False for a stage that the present launch has completed.
            `build` sets it to True if that result is damaged, or is a model with other inputs.
        asked_part: name of the part (see `runs.parts`) that the user asked for, or None.
    """

    def __init__(self, config: PipelineConfig, part: str | None = None) -> None:
        """Read the settings of a run.

        Args:
            config: the resolved configuration.
            part: name of the export, and of its proof and its upload, that this run means by `export`. If it is None,
                export.target names it. If this is None too, it is the export that was asked for last.
        """
        self.config = config
        self.stage = config.stage
        self.recipe = config.recipe
        self.directory = absolute(config.run_dir)
        self.asked_part = part or (config.export.target and config.export.target.name)
        self._shared = None if config.base_run is None else absolute(config.base_run)
        asks = rebuilds(config.overwrite, config.stage)
        self.overwrite = asks and not launches.has_written(self._own_dir(config.stage.name) / ARTIFACT_FILE)

    def stage_dir(self, stage: Stage | str) -> Path:
        """Return the directory of a stage, in this run or in `base_run`.

        It is in `base_run` if this run has not begun the stage and can use the stage of `base_run` unchanged.
        Directories that belong to no stage (tables of data, a synthetic source) are kept in `base_run` alone. The name
        of an export may end with its target (`export/gguf`). Otherwise `part` in `Run` names the target.
        """
        name = stage.name if isinstance(stage, Stage) else stage
        own = self._own_dir(name)
        if name.partition("/")[0] in parts.STAGES:
            return own
        is_begun = (own / ARTIFACT_FILE).is_file() or (own / UNFINISHED_FILE).is_file()
        if self._shared is None or is_begun or self._replaces(name):
            return own
        shared = self._shared / name
        return shared if name not in Stage.__members__ or self._can_use(shared) else own

    def _replaces(self, stage: str) -> bool:
        """Whether adapters of another program take the place of this stage."""
        return stage == Stage.sft.name and self.config.quantize.adapters is not None

    def _own_dir(self, name: str) -> Path:
        first, _, part = name.partition("/")
        if first in parts.STAGES:
            return parts.find(self.directory / first, part or self.part)
        return self.directory / name

    def place(self, stage: Stage) -> Path:
        """Return the directory of a stage. If the stage has parts, it is the directory above them."""
        return self.directory / stage.name if stage.name in parts.STAGES else self.stage_dir(stage)

    @property
    def part(self) -> str:
        """Name of the part that this run means, if a stage has parts."""
        return self.asked_part or parts.newest(self.place(Stage.export)) or DEFAULT_TARGET.name

    def is_complete(self, stage: Stage) -> bool:
        """Whether a stage of this run is complete."""
        return (self.stage_dir(stage) / ARTIFACT_FILE).is_file()

    def require(self, stage: Stage, check_files: bool = True) -> Artifact:
        """Return the complete artifact of another stage of this run.

        Raises:
            UserError: the stage is missing, unfinished or stale, or the run is not there. The message says what to do.
        """
        directory = self.stage_dir(stage)
        if not (directory / ARTIFACT_FILE).is_file():
            self.raise_if_absent()
            state = "unfinished" if directory.is_dir() else "missing"
            target = [f"export.target={self.part}"] if stage.name in parts.STAGES and self.asked_part else []
            target += self.export_source(directory) if stage is Stage.export else []
            first = self.command(stage, *target, run_dir=self.config.base_run)
            if self._shared is not None:
                first += ", or this command with that stage"
            raise UserError(f"stage={self.stage.name} needs {directory}, which is {state}. {advise(first)}")
        artifact = load(directory, check_files)
        stale = self.staleness(artifact)
        if stale is not None:
            raise UserError(stale)
        return artifact

    def raise_if_absent(self) -> None:
        """Raise UserError if this run is not there, and the command does not describe a new one (`absent_runs`)."""
        if self._shared is None:
            absent_runs.raise_if_absent(self.config.run_dir, self.recipe)

    def staleness(self, artifact: Artifact) -> str | None:
        """Return a message if a model of this run is stale, else None.

        A model is stale if a stage before it was rebuilt. An export is stale if the exported model was rebuilt, or is
        stale itself. A parent is not checked if its directory was removed to save space. A report is not checked,
        because its stage rebuilds it if its inputs have changed.
        """
        if artifact.kind is Kind.report:
            return None
        is_export = artifact.stage == Stage.export.name
        for name, parent, fingerprint in self._exported(artifact) if is_export else self._parents(artifact):
            if parent.fingerprint != fingerprint:
                return (
                    f"{artifact.directory} was made from an earlier {name}, which was rebuilt later."
                    f" Rebuild it: {self.rebuild_command(artifact)}"
                )
            is_own = name in Stage.__members__ and parent.directory == self.stage_dir(name)
            if is_own and (inherited := self.staleness(parent)) is not None:
                return inherited
        return None

    def _parents(self, artifact: Artifact) -> Iterator[tuple[str, Artifact, str]]:
        """Yield the stages of the run that a model was made from: name, artifact, and the fingerprint at that time."""
        for name, fingerprint in artifact.parents.items():
            if name in Stage.__members__ and self.is_complete(Stage[name]):
                yield name, load(self.stage_dir(name), check_files=False), fingerprint

    def _exported(self, export: Artifact) -> Iterator[tuple[str, Artifact, str]]:
        """Yield the model that an export was made from, as `_parents`. If it is not where it was, yield nothing.

        A model of the run or of a control is looked for in this run alone. The path at which it was exported may hold
        another run, because runs are moved and copied. Only a model that the user named by its path is sought there.
        """
        record, fingerprint = export.read(ExportRecord), export.parents["model"]
        name = record.exported_from
        if name in Stage.__members__:
            place = self.stage_dir(name)
        else:
            place = self.directory / name if is_control(name) else Path(record.exported_directory)
        if (place / ARTIFACT_FILE).is_file():
            yield name, load(place, check_files=False), fingerprint

    def export_source(self, directory: Path) -> list[str]:
        """Return the override for the source with which an unfinished export was begun. It is empty without a source.

        It is also empty if unfinished.json is not readable. The export then says so itself.
        """
        try:
            before = self.read_unfinished(directory)
        except UserError:
            return []
        source = None if before is None else before["settings"].get(_EXPORT_SOURCE)
        return [assignment(_EXPORT_SOURCE, source)] if isinstance(source, str) else []

    def rebuild_command(self, artifact: Artifact) -> str:
        """Return the command that makes a stage again from the same source, by the settings that it was made with."""
        if (command := rebuild_command(artifact.directory)) is not None:
            return command
        place, source = locate(artifact.directory), artifact.settings.get(_EXPORT_SOURCE)
        named = [assignment(_EXPORT_SOURCE, source)] if isinstance(source, str) else []
        return self.command(Stage[artifact.stage], *(place.target if place else ()), *named, "overwrite=true")

    def report_parents(self, stage: Stage) -> dict[str, str]:
        """Return the parents of a stage's report. The report may be unfinished. Without a report, the result is empty.

        Raises:
            UserError: as `load`.
        """
        directory = self.stage_dir(stage)
        if self.is_complete(stage):
            return load(directory).parents
        return (self.read_unfinished(directory) or {"parents": {}})["parents"]

    def read_unfinished(self, directory: Path) -> dict[str, Any] | None:
        """Read the inputs in unfinished.json of a stage's directory. Return None if the stage is not unfinished.

        With overwrite=true, the result is also None if the file cannot be used.

        Raises:
            UserError: the file is not readable or damaged, or a newer version of the program wrote it.
        """
        try:
            return _read_unfinished(directory)
        except UserError:
            if self.overwrite:
                return None
            raise

    def earlier_stages(self) -> list[Stage]:
        """List the stages to run before the stage that the user asked for.

        These are the earlier stages that `base_run` has. If the settings of such a stage differ, this run makes the
        stage itself. A stage that `base_run` lacks is left out, because otherwise every job of a sweep would train it.
        `require` asks the user to run it.
        """
        if self._shared is None or self.stage not in MODEL_STAGES:
            return []
        earlier = MODEL_STAGES[: MODEL_STAGES.index(self.stage)]
        skips_sft = self.config.quantize.source != QuantizeSource.sft
        there = [stage for stage in earlier if (self._shared / stage.name / ARTIFACT_FILE).is_file()]
        return [stage for stage in there if not (skips_sft and stage is Stage.sft)]

    def settings(self, keys: Iterable[str]) -> Settings:
        """Return the settings under some keys, as a flat dictionary from dotted key to plain value."""
        return choose_settings(self.config, keys)

    def command(self, stage: Stage, *overrides: str, run_dir: str | None = None) -> str:
        """Return the command that runs a stage in `run_dir`, or in this run, with the settings of this run.

        For the stage that runs now, it also repeats the settings of this command alone, such as `export.source`.
        """
        further = by_key([*(asked(stage) if stage is self.stage else []), *overrides]).values()
        return run_command(stage, run_dir or self.config.run_dir, *further, recipe=self.recipe)

    def not_writable(self, directory: Path, error: OSError) -> UserError:
        """Make the error for a directory of the run that cannot be created or written."""
        return UserError(
            f"run_dir={self.config.run_dir}: cannot write {directory} ({error.strerror})."
            " Set run_dir to a writable place."
        )

    def _can_use(self, directory: Path) -> bool:
        """Whether this run can use a stage of `base_run`. The settings of the stage and its parents must be the same.

        If the user asks to rebuild the stage (overwrite=true), this run makes the stage itself. The stage in `base_run`
        does not change, because other runs use it too.
        """
        name = directory.name
        is_rebuilt = self.overwrite and self.stage.name == name
        if Stage[name] not in MODEL_STAGES or is_rebuilt or not (directory / ARTIFACT_FILE).is_file():
            return False
        artifact = load(directory, check_files=False)
        stages = (parent for parent in artifact.parents if parent in Stage.__members__)
        parents = [stage for stage in stages if not self._replaces(stage)]
        has_same_parents = all(self.stage_dir(parent) == directory.with_name(parent) for parent in parents)
        return (
            has_same_parents
            and self._gives_same(artifact.settings)
            and artifact.parents.get(START) == self._start_of(name)
        )

    def _gives_same(self, settings: Settings) -> bool:
        """Whether this run gives the settings of a stage of `base_run`. Two paths of one model or data set are equal.

        A relative path starts where `base_run` was made, not where this command runs. command.yaml knows the place.
        """
        own = None if self._shared is None else own_settings.read(self._shared)
        return not {*places.differing(settings, self.settings(settings), own)} - {_START_PATH}

    def _start_of(self, stage: str) -> str | None:
        """Return the fingerprint of the model in `sft.start`, or None if the stage does not start from it."""
        start = self.config.sft.start
        if start is None or stage != Stage.sft.name:
            return None
        return load(absolute(start), check_files=False).fingerprint


def _read_unfinished(directory: Path) -> dict[str, Any] | None:
    path = directory / UNFINISHED_FILE
    try:
        record = read_record(path)
        version = record.pop("version", 1)
        record.pop(launches.KEY, None)
        if {"settings", "parents", "data"} - record.keys() or not isinstance(version, int):
            raise ValueError("it lacks the stage's inputs")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not readable, so the unfinished work beside it cannot be resumed ({error}). Use"
            " overwrite=true to start the stage again."
        ) from error
    raise_if_newer(path, version, None)
    return record | {"settings": without_secrets(record["settings"])}


def write_unfinished(directory: Path, inputs: Mapping[str, object]) -> None:
    """State the inputs of an unfinished stage in unfinished.json."""
    write_json(directory / UNFINISHED_FILE, seal({"version": ARTIFACT_VERSION, **inputs, **launches.note()}))
