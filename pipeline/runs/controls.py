"""The directories of controls: `<run_dir>/controls/<name>` is a run with links to stages of the main run."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import Stage
from pipeline.config.controls import DIRECTORY, Control
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact, load
from pipeline.runs.json_files import write_json
from pipeline.runs.processes import is_main_process, wait_for_everyone
from pipeline.runs.run import START, Run

CONTROL_FILE = "control.json"
"""File in a control's directory. It names the stage that makes the control's model."""

_SHARED = ("source", "data", "predictions")  # directories of a run that belong to no stage


@dataclass(frozen=True)
class Made:
    """A complete control.

    Attributes:
        model: name of its model in the results, as `Control.model`.
        artifact: the stage that made the model.
        is_stale: whether the main run's stages were rebuilt since.
    """

    model: str
    artifact: Artifact
    is_stale: bool


def prepare(main: Run, control: Control, stages: Iterable[Stage]) -> None:
    """Make the control's directory, with links to the stages of the main run that the control does not run itself.

    A link that is left from other settings is removed if the control runs that stage itself. Otherwise, the control
    would write into the main run.

    Args:
        main: the main run. Its `upcast` and `sft` are complete.
        control: the control.
        stages: the stages that the control runs itself.
    """
    wait_for_everyone()
    if is_main_process():
        directory = main.directory / DIRECTORY / control.name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for stage in stages:
                if (directory / stage.name).is_symlink():
                    (directory / stage.name).unlink()
            linked = [stage.name for stage in (Stage.upcast, Stage.sft) if stage not in stages]
            for name in (*linked, *_SHARED):
                _link(directory / name, main.stage_dir(name))
            write_json(directory / CONTROL_FILE, {"stage": control.stages[-1].name})
        except OSError as error:
            raise main.not_writable(directory, error) from error
    wait_for_everyone()


def _link(path: Path, target: Path) -> None:
    if path.is_symlink():
        path.unlink()
    if target.is_dir() and not path.exists():
        there = target.parent.resolve() / target.name
        path.symlink_to(os.path.relpath(there, path.parent.resolve()), target_is_directory=True)


def find_made(main: Run) -> Iterator[Made]:
    """Find the complete controls of a run, in the order of their names. Files of their models are not checked."""
    for file in sorted((main.directory / DIRECTORY).glob(f"*/{CONTROL_FILE}")):
        stage = json.loads(file.read_text(encoding="utf-8"))["stage"]
        directory = file.parent / stage
        if (directory / ARTIFACT_FILE).is_file():
            artifact = load(directory, check_files=False)
            yield Made(f"{DIRECTORY}/{file.parent.name}/{stage}", artifact, _is_stale(main, artifact))


def _is_stale(main: Run, artifact: Artifact) -> bool:
    own = Run(replace(main.config, run_dir=str(artifact.directory.parent), base_run=None))
    sft = load(own.stage_dir(Stage.sft), check_files=False) if own.is_complete(Stage.sft) else None
    start = None if sft is None else sft.parents.get(START)
    expected = load(main.stage_dir(Stage.sft), check_files=False).fingerprint if main.is_complete(Stage.sft) else None
    return own.staleness(artifact) is not None or start not in (None, expected)
