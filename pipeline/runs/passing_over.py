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


def raise_if_export_is_older(run: Run, export: Artifact, as_it_is: str | None = None) -> None:
    """Raise UserError if the exported model is being rebuilt, or a later model has begun.

    Args:
        run: the run.
        export: the complete export.
        as_it_is: the override that uses the export nevertheless. None: export.source with the exported model.

    Raises:
        UserError: as described. The later models do not count for an export from a source that the user named.
    """
    record = export.read(ExportRecord)
    source = record.exported_from
    if source not in Stage.__members__ or run.config.export.source == source:
        return
    own = MODEL_STAGES.index(Stage[source])
    is_named = export.settings.get("export.source") is not None
    if unfinished := find_unfinished(run, MODEL_STAGES[own : own + 1] if is_named else MODEL_STAGES[own:]):
        last = unfinished[-1]
        again = run.command(Stage.export, f"export.target={record.target}", "overwrite=true")
        reason = (
            f"an earlier {source}, which is being rebuilt and is unfinished"
            if last.name == source
            else f"{source}, but {last.name} has begun since and is unfinished"
        )
        raise UserError(
            f"{export.directory} was made from {reason}. Finish {last.name}: {last.command}, then export and verify"
            f" again: {again}. Or use this export as it is:"
            f" {run.command(run.stage, as_it_is or f'export.source={source}')}"
        )
