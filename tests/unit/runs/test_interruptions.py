"""An interruption says what is kept, and which command goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import PipelineConfig, Stage
from pipeline.runs import interruptions
from pipeline.runs.run import Run


def interrupted(run_dir: Path, stage: Stage, fill: Callable[[Path], None]) -> str:
    """Interrupt a stage after `fill` has written files into its directory, and return the message."""
    config = PipelineConfig(stage=stage, run_dir=str(run_dir))
    directory = run_dir / stage.name
    directory.mkdir()
    with pytest.raises(KeyboardInterrupt), interruptions.working(Run(config), stage):
        fill(directory)
        raise KeyboardInterrupt
    return interruptions.message("interrupted")


def checkpoint(directory: Path, step: int, is_whole: bool = True) -> None:
    path = directory / "checkpoints" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if is_whole:
        (path / "whole").write_text("{}")


def test_training_names_the_step_of_the_last_whole_checkpoint(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        for step, is_whole in ((20, True), (100, True), (120, False)):
            checkpoint(directory, step, is_whole)

    message = interrupted(tmp_path, Stage.qat, fill)
    assert message.startswith(
        "interrupted. stage=qat: the next run starts from step 100, its last checkpoint. To go on"
    )


def test_training_without_a_checkpoint_names_the_setting(tmp_path: Path) -> None:
    assert (
        "stage=sft: the next run starts from the beginning, because there is no checkpoint yet (sft.save_steps="
        in interrupted(tmp_path, Stage.sft, lambda directory: None)
    )


def test_finished_weight_files_and_layers_are_counted(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "base").mkdir()
        (directory / "base" / "shards.json").write_text(json.dumps({"a": {}, "b": {}}))
        layers = directory / "checkpoints" / "gptq"
        layers.mkdir(parents=True)
        (layers / "layer-000.safetensors").touch()

    assert "kept so far: 1 rounded layer and 2 weight files." in interrupted(tmp_path, Stage.quantize, fill)


def test_measured_models_and_answers_are_counted(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "sft.json").write_text('{"inputs": {}, "figures": {}}')
        (directory / "unfinished.json").write_text("{}")
        (directory / "qat").mkdir()
        (directory / "qat" / "generations.jsonl").write_text("{}\n{}\n")

    assert "kept so far: 1 measured model and 2 answers." in interrupted(tmp_path, Stage.evaluate, fill)


def test_a_complete_stage_that_was_not_yet_touched_stays(tmp_path: Path) -> None:
    message = interrupted(
        tmp_path, Stage.sft, lambda directory: (directory / "artifact.json").write_text("{}") and None
    )
    assert "stage=sft is as it was before." in message


def test_an_error_that_is_no_interruption_leaves_nothing_to_say(tmp_path: Path) -> None:
    run = Run(PipelineConfig(stage=Stage.sft, run_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="wrong"), interruptions.working(run, Stage.sft):
        raise ValueError("wrong")
    assert interruptions.message("interrupted").startswith("interrupted. To go on: ")
