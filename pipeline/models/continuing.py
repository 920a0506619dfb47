"""Find the fine-tuned model that SFT continues (`sft.start`), and check that it can be continued."""

import os
from dataclasses import replace
from pathlib import Path

from pipeline.config import Method, SftConfig, Stage
from pipeline.errors import UserError
from pipeline.models import references
from pipeline.models.references import ModelRef
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact, load
from pipeline.runs.paths import absolute
from pipeline.runs.run import Run
from pipeline.runs.settings import choose_settings


def find_start(run: Run, upcast: Artifact, sft: SftConfig) -> ModelRef | None:
    """Return the model in `sft.start`, or None if SFT starts from the upcast.

    Training can continue with another method. New adapters go on a full checkpoint. Full training merges adapters and
    decodes packed experts.

    Raises:
        UserError: the directory is not a complete `sft` stage, has another base, or cannot be trained as configured.
    """
    if sft.start is None:
        return None
    ref, artifact = check_start(run, sft.start)
    if artifact.parents.get(Stage.upcast.name) != upcast.fingerprint:
        raise UserError(
            f"sft.start={sft.start}: was made from another checkpoint than {upcast.directory}. Use the model.path and"
            " the upcast.experts of the run that made it."
        )
    if ref.adapter and ref.base.name == Stage.upcast.name:
        ref = replace(ref, base=upcast.directory)
    return ref


def check_start(run: Run, start: str) -> tuple[ModelRef, Artifact]:
    """Return the model in `sft.start`, and its artifact. Its base is checked by `find_start`, which needs the upcast.

    Raises:
        UserError: the directory is not a complete `sft` stage, or cannot be trained as configured.
    """
    artifact = _load(run, start)
    ref = references.of_artifact(artifact)
    _raise_if_untrainable(run, run.config.sft, ref, artifact)
    return ref, artifact


def relative_path(start: Path, run_dir: Path) -> str:
    """Return the path of a stage's directory as seen from a run's directory.

    Both may be reached through symbolic links. A link that is the stage itself is kept, so that a run can be moved.
    """
    return os.path.relpath(start.parent.resolve() / start.name, run_dir.resolve())


def _load(run: Run, start: str) -> Artifact:
    directory = absolute(start)
    if not (directory / ARTIFACT_FILE).is_file():
        raise UserError(
            f"sft.start={start}: not a complete stage. Give the directory of a complete sft stage, such as"
            " runs/smoke/sft."
        )
    if directory.resolve() == run.stage_dir(Stage.sft).resolve():
        raise UserError(
            f"sft.start={start}: this is the directory that stage=sft writes. Set another run_dir for the continuation."
        )
    artifact = load(directory)
    if artifact.stage != Stage.sft.name:
        raise UserError(f"sft.start={start}: was made by stage={artifact.stage}. Give the directory of an sft stage.")
    return artifact


def _raise_if_untrainable(run: Run, sft: SftConfig, ref: ModelRef, artifact: Artifact) -> None:
    if sft.method is Method.bf16_parts and not (ref.is_packed and not ref.adapter):
        raise UserError(
            f"sft.method=bf16_parts: the experts of sft.start={sft.start} were trained, so their MXFP4 bytes would not"
            " reach the export unchanged. Start from an sft of bf16_parts, or use sft.method=full or lora."
        )
    adapters = choose_settings(run.config, ["sft.lora"])
    if sft.method is Method.lora and ref.adapter:
        differences = [
            f"{key}={wanted}, but {artifact.settings.get(key)} there"
            for key, wanted in adapters.items()
            if artifact.settings.get(key) != wanted
        ]
        if differences:
            raise UserError(
                f"sft.start={sft.start}: training continues with its adapters, but the settings differ:"
                f" {'; '.join(differences)}. Use the same values."
            )
