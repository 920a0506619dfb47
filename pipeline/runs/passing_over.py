"""Refuse to take an earlier model silently when the run has begun a later one."""

from collections.abc import Sequence

from pipeline.config import Stage
from pipeline.errors import UserError
from pipeline.runs.artifacts import ARTIFACT_FILE, MODEL_STAGES, UNFINISHED_FILE, Artifact
from pipeline.runs.records import ExportRecord
from pipeline.runs.run import Run


def find_unfinished(run: Run, among: Sequence[Stage]) -> list[Stage]:
    """List the stages that have begun and are not complete."""
    return [
        stage
        for stage in among
        if (run.stage_dir(stage) / UNFINISHED_FILE).is_file() and not (run.stage_dir(stage) / ARTIFACT_FILE).is_file()
    ]


def raise_if_passed_over(run: Run, chosen: Stage, among: Sequence[Stage], key: str) -> None:
    """Raise UserError if a stage after the chosen one is unfinished.

    Args:
        run: the run.
        chosen: the newest complete stage.
        among: the stages to choose from, in order.
        key: the setting that names a stage explicitly.
    """
    later = among[among.index(chosen) + 1 :]
    if run.is_complete(chosen) and (unfinished := find_unfinished(run, later)):
        last = unfinished[-1]
        raise UserError(
            f"{run.stage_dir(last)} is unfinished, so {key} is not clear. Finish {last.name}: {run.command(last)}. Or"
            f" take the newest complete model: {run.command(run.stage, f'{key}={chosen.name}')}"
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
            f" {last.name}: {run.command(last)}, then export and verify again: {again}. Or use this export as it is:"
            f" {run.command(run.stage, f'export.source={source}')}"
        )
