"""Keep the answers of an earlier report when a command does not ask for answers."""

from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import EvaluateConfig, PipelineConfig, Stage, is_known
from pipeline.config.overrides import key_of
from pipeline.config.secrets import HIDDEN
from pipeline.errors import UserError
from pipeline.runs import commands
from pipeline.runs.artifacts import load
from pipeline.runs.run import Run
from pipeline.runs.settings import Settings, choose_settings
from pipeline.runs.up_to_date import say_if_needed

_GENERATE = "evaluate.generate"
_OF_ANSWERS = (_GENERATE, "evaluate.prompts.", "evaluate.generation.")
_KEPT = ("eval", "evaluate.generate", "evaluate.prompts", "evaluate.generation")


def keep(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with the settings of the earlier report's answers, if the command does not set any.

    Otherwise, a command without `eval=quick` would measure all models again, and the report would lose the answers. A
    command that names `eval` or `evaluate.generate`, or that rebuilds the report, has its own settings.
    """
    here = Run(config)
    before = _settings_before(here)
    if config.evaluate.generate or here.overwrite or not before.get(_GENERATE) or _names_generation():
        return config
    chosen = _without_masked({key: value for key, value in before.items() if key.startswith(_OF_ANSWERS)}, here)
    kept = _with(config.evaluate, chosen)
    if kept is None:
        return config
    if (command := commands.current()) is not None:
        command.kept = _KEPT
    say_if_needed(
        Stage.evaluate.name,
        "keeping the answers of the earlier report, and their settings. To evaluate without answers, set eval=none",
    )
    return replace(config, evaluate=kept)


def _names_generation() -> bool:
    command = commands.current()
    given = [] if command is None else [key_of(each) for each in command.arguments]
    return "eval" in given or _GENERATE in given


def _settings_before(here: Run) -> Settings:
    """Return the settings of the earlier report. It may be unfinished. Without a report, the result is empty."""
    directory = here.stage_dir(Stage.evaluate)
    if here.is_complete(Stage.evaluate):
        return load(directory, check_files=False).settings
    return (here.read_unfinished(directory) or {"settings": {}})["settings"]


def _without_masked(settings: Settings, here: Run) -> Settings:
    """Leave out the settings that contain a hidden secret. The configuration must have them already."""
    present = choose_settings(here.config, settings)
    masked = [key for key, value in settings.items() if HIDDEN in str(value)]
    if unknown := [key for key in masked if present[key] != settings[key]]:
        raise UserError(
            f"{unknown[0]}: the earlier report in {here.stage_dir(Stage.evaluate)} has {settings[unknown[0]]!r}, where"
            f" {HIDDEN} stands for a secret. To keep its answers, give this setting again. To evaluate without answers,"
            " set eval=none."
        )
    return {key: value for key, value in settings.items() if key not in masked}


def _with(evaluate: EvaluateConfig, settings: Settings) -> EvaluateConfig | None:
    """Return `evaluate` with other settings, given by full keys. Return None if this program does not know them."""
    if not all(is_known(key) for key in settings):
        return None
    node = OmegaConf.structured(evaluate)
    try:
        for key, value in settings.items():
            OmegaConf.update(node, key.removeprefix("evaluate."), value, force_add=True)
        kept: Any = OmegaConf.to_object(node)
    except OmegaConfBaseException:
        return None
    assert isinstance(kept, EvaluateConfig)
    return kept
