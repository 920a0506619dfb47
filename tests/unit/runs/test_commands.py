"""The commands that messages tell the user to run."""

import shlex

from pipeline.config import PipelineConfig, Stage
from pipeline.runs.commands import stage_command


def test_a_command_names_stage_recipe_run_and_further_settings() -> None:
    assert (
        stage_command(Stage.export, "overwrite=true", run_dir="runs/mine", recipe="smoke")
        == "python -m pipeline stage=export recipe=smoke run_dir=runs/mine overwrite=true"
    )


def test_a_default_is_not_shown() -> None:
    assert stage_command(Stage.sft, recipe=PipelineConfig.recipe) == "python -m pipeline stage=sft"


def test_a_directory_with_a_space_can_be_pasted_into_a_shell() -> None:
    command = stage_command(Stage.verify, run_dir="/data/my runs/a")
    assert shlex.split(command)[3:] == ["stage=verify", "run_dir=/data/my runs/a"]
