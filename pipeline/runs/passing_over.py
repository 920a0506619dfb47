"""Refuse to take an earlier model silently when the run has begun a later one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Stage
from pipeline.config.targets import TARGETS
from pipeline.errors import UserError
from pipeline.runs import parts
from pipeline.runs.artifacts import ARTIFACT_FILE, MODEL_STAGES, UNFINISHED_FILE, Artifact
from pipeline.runs.records import ExportRecord
from pipeline.runs.run import Run


@dataclass(frozen=True)
class Unfinished:
    """A stage that has begun and is not complete.

    Attributes:
        name: name of the stage. For an export, with its target: `export/gguf`.
        directory: directory of the stage.
        command: the command that finishes it.
    """

    name: str
    directory: Path
    command: str


def find_unfinished(run: Run, among: Sequence[Stage], models_only: bool = False) -> list[Unfinished]:
    """List the stages that have begun and are not complete. Each export counts on its own.

    Args:
        run: the run.
        among: the stages to look at.
        models_only: whether to leave out exports in layouts that transformers cannot load.
    """
    found = []
    for stage in among:
        if stage.name in parts.STAGES:
            for target, directory in parts.find_unfinished(run.place(stage)).items():
                if models_only and target in TARGETS and not TARGETS[target].is_loadable:
                    continue
                command = run.command(stage, f"export.target={target}", *run.export_source(directory))
                found.append(Unfinished(f"{stage.name}/{target}", directory, command))
            continue
        directory = run.stage_dir(stage)
        if (directory / UNFINISHED_FILE).is_file() and not (directory / ARTIFACT_FILE).is_file():
            found.append(Unfinished(stage.name, directory, run.command(stage)))
    return found


def raise_if_passed_over(run: Run, chosen: Stage, among: Sequence[Stage], key: str) -> None:
    """Raise UserError if a stage after the chosen one is unfinished. Exports that are no models do not count.

    Args:
        run: the run.
        chosen: the newest complete stage.
        among: the stages to choose from, in order.
        key: the setting that names a stage explicitly.
    """
    later = among[among.index(chosen) + 1 :]
    if run.is_complete(chosen) and (unfinished := find_unfinished(run, later, models_only=True)):
        last = unfinished[-1]
        raise UserError(
            f"{last.directory} is unfinished, so {key} is not clear. Finish {last.name}: {last.command}. Or take the"
            f" newest complete model: {run.command(run.stage, f'{key}={chosen.name}')}"
        )


def raise_if_export_is_passed_over(run: Run, taken: str, models_only: bool = False) -> None:
    """Raise UserError if export.target is null, and an export is unfinished beside the complete one.

    Args:
        run: the run.
        taken: target of the complete export.
        models_only: as for `find_unfinished`.
    """
    if run.asked_part is None and (unfinished := find_unfinished(run, [Stage.export], models_only)):
        last = unfinished[-1]
        raise UserError(
            f"{last.directory} is unfinished, so export.target is not clear. Finish {last.name}: {last.command}. Or"
            f" take the complete export: {run.command(run.stage, f'export.target={taken}')}"
        )


def raise_if_export_is_older(run: Run, export: Artifact) -> None:
    """Raise UserError if `export` took a model by itself, and a later model has begun since.

    Raises:
        UserError: as described. An export from a source that the user named is not refused.
    """
    record = export.read(ExportRecord)
    source = record.exported_from
    if run.config.export.source == source or export.settings.get("export.source") is not None:
        return
    later = [] if source not in Stage.__members__ else MODEL_STAGES[MODEL_STAGES.index(Stage[source]) + 1 :]
    if unfinished := find_unfinished(run, later):
        last = unfinished[-1]
        again = run.command(Stage.export, f"export.target={record.target}", "overwrite=true")
        raise UserError(
            f"{export.directory} was made from {source}, but {last.name} has begun since and is unfinished. Finish"
            f" {last.name}: {last.command}, then export and verify again: {again}. Or use this export as it is:"
            f" {run.command(run.stage, f'export.source={source}')}"
        )
