"""Commands of this program, as messages show them."""

import shlex

from pipeline.config import PipelineConfig, Stage, program


def stage_command(
    stage: Stage, *overrides: str, run_dir: str | None = None, recipe: str = PipelineConfig.recipe
) -> str:
    """Return the command that runs a stage, quoted for a shell.

    Args:
        stage: the stage to run.
        overrides: further settings, each as key=value.
        run_dir: directory of the run, or None for the default.
        recipe: name of the recipe. The default recipe is left out of the command.
    """
    settings = [f"stage={stage.name}"]
    if recipe != PipelineConfig.recipe:
        settings.append(f"recipe={recipe}")
    if run_dir is not None:
        settings.append(f"run_dir={run_dir}")
    return f"{program.name()} {shlex.join([*settings, *overrides])}"
