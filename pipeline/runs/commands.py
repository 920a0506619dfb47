"""Commands that messages tell the user to run."""

import shlex

from pipeline.config import PipelineConfig, Stage


def stage_command(
    stage: Stage, *overrides: str, run_dir: str | None = None, recipe: str = PipelineConfig.recipe
) -> str:
    """The command that runs a stage, ready to be pasted into a shell.

    Args:
        stage: to run.
        overrides: further settings, each as key=value.
        run_dir: of the run; None: left to the default.
        recipe: of the run; not shown if it is the default, which stands for no recipe.
    """
    settings = [f"stage={stage.name}"]
    if recipe != PipelineConfig.recipe:
        settings.append(f"recipe={recipe}")
    if run_dir is not None:
        settings.append(f"run_dir={run_dir}")
    return f"python -m pipeline {shlex.join([*settings, *overrides])}"
