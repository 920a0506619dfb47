"""A control's directory: its links to the main run, and how stale models are found."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import ModelConfig, PipelineConfig, Stage
from pipeline.config.controls import Control
from pipeline.runs import controls
from pipeline.runs.run import Run


@pytest.fixture
def main(tmp_path: Path) -> Run:
    run = Run(PipelineConfig(Stage.controls, run_dir=str(tmp_path / "run"), model=ModelConfig("gpt")))
    for name in ("upcast", "sft", "data"):
        run.stage_dir(name).mkdir(parents=True)
    return run


def parts_of(main: Run) -> Control:
    config = replace(main.config, run_dir=f"{main.directory}/controls/bf16_parts")
    return Control("bf16_parts", config, (Stage.upcast, Stage.sft), "its origin")


def test_a_link_is_removed_if_the_control_makes_the_stage_itself(main: Run) -> None:
    control, directory = parts_of(main), main.directory / "controls" / "bf16_parts"
    controls.prepare(main, control, [Stage.sft])
    assert (directory / "upcast").resolve() == main.directory.resolve() / "upcast"
    controls.prepare(main, control, [Stage.upcast, Stage.sft])
    assert not (directory / "upcast").exists() and (main.directory / "upcast").is_dir()
    assert (directory / "data").is_symlink()
