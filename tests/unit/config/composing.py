"""Functions that compose and check configurations and command lines for tests."""

import copy
import sys
import types
from collections.abc import Callable
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
from composing import composed_quickly
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from pipeline import __main__ as program
from pipeline.config import DataConfig, ModelConfig, PipelineConfig, Stage, command_line, composition, rules

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path.stem for path in composition.RECIPES_DIR.glob("*.yaml"))
STAGES = [stage.name for stage in Stage]
SYNTHETIC_DATA = "data.path=synthetic://arithmetic"


Run = Callable[[PipelineConfig], None]
Mistake = Callable[..., str]


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    program.register()
    with composed_quickly(), initialize_config_dir(str(program.CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides))


def composed(*overrides: str) -> DictConfig:
    return copy.deepcopy(_composed(overrides))


@cache
def _resolved(overrides: tuple[str, ...]) -> PipelineConfig:
    return rules.resolve(_composed(overrides))


def resolved(*overrides: str) -> PipelineConfig:
    return copy.deepcopy(_resolved(overrides))


def found_on(*arguments: str) -> str:
    """Return the only mistake in a command line. This check runs before the configuration is composed."""
    (problem,) = command_line.problems(list(arguments), program.FOLDERS)
    return problem


def broken(**settings: Any) -> list[str]:
    """List the rules that a configuration breaks with these settings. Two underscores in a name stand for a dot."""
    changed = PipelineConfig(stage=Stage.sft, model=ModelConfig(path="model"), data=DataConfig(path="data"))
    for key, value in settings.items():
        *sections, name = key.split("__")
        setattr(reduce(getattr, sections, changed), name, value)
    return rules.problems(changed)


def replace_stages(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name in STAGES:
        module = types.ModuleType(f"pipeline.stages.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)


def write_recipe(folder: Path, text: str) -> None:
    (folder / "recipe").mkdir()
    (folder / "recipe" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: arithmetic\n\n{text}"
    )


def choices() -> list[str]:
    groups = {"train": ("train@sft", "train@qat")}
    return [
        f"{key}={path.stem}"
        for path in sorted(program.CONF_DIR.glob("*/*.yaml"))
        for key in groups.get(path.parent.name, (path.parent.name,))
    ]


def one_line(message: str) -> str:
    assert "\n" not in message
    return message
