"""Composition of recipes, groups, overrides and sweeps."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composing import composed_quickly
from conftest import run_program
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from config.composing import RECIPES, SYNTHETIC_DATA, Mistake, choices, composed, resolved, write_recipe
from pipeline import __main__ as program
from pipeline.config import (
    LoraConfig,
    LoraTarget,
    Method,
    PipelineConfig,
    Precision,
    Sharding,
    Stage,
    command_line,
    composition,
    rules,
)
from pipeline.errors import UserError


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves_for_every_stage(recipe: str) -> None:
    node = composed(f"recipe={recipe}", "stage=all")
    found = rules.resolve(node)
    assert (found.stage, found.recipe, found.run_dir) == (Stage.all, recipe, f"runs/{recipe}")
    assert "${stage" not in OmegaConf.to_yaml(node)  # so another stage changes no other setting
    for stage in Stage:
        assert rules.problems(replace(found, stage=stage)) == []


@pytest.mark.parametrize("more", [(), ("train@qat=lora", "format=nvfp4", "+sft.lr=1")])
def test_the_tests_compose_what_hydra_composes(more: tuple[str, ...]) -> None:
    """`composed_quickly` spares Hydra's work. Its second composition merges no file."""
    overrides = ["recipe=smoke", "stage=sft", "sft.max_steps=3", *more]
    with initialize_config_dir(str(program.CONF_DIR), version_base="1.3"):
        plain = compose("config", overrides)
        with composed_quickly():
            first, second = compose("config", overrides), compose("config", overrides)
    assert described(plain) == described(first) == described(second)
    assert second._get_flag("struct") and (more == () or second.sft.lr == 1)


def described(node: Any) -> object:
    """Return the types, the flags and the content of a node of OmegaConf and of the nodes in it."""
    data = node._metadata
    facts = (type(node), data.ref_type, data.object_type, data.optional, data.key, data.flags)
    if not isinstance(node, DictConfig | ListConfig) or isinstance(node._content, str | None):
        return facts, node._value()
    items = node._content.items() if isinstance(node, DictConfig) else enumerate(node._content)
    return facts, {key: described(value) for key, value in items}


@pytest.mark.parametrize("stage", Stage)
def test_every_stage_can_be_named_on_the_command_line(stage: Stage) -> None:
    node = composed("recipe=smoke", "stage=all")
    node.stage = stage.name
    assert rules.resolve(node).stage is stage


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_opens_with_its_own_command(recipe: str) -> None:
    first = (composition.RECIPES_DIR / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and "-m pipeline " in first
    arguments = first.partition("-m pipeline ")[2].split()
    assert f"recipe={recipe}" in arguments
    assert command_line.problems(arguments, program.FOLDERS) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_for_several_gpus_shards_the_model_and_its_command_starts_as_many_processes(recipe: str) -> None:
    text = (composition.RECIPES_DIR / f"{recipe}.yaml").read_text(encoding="utf-8")
    command = text.splitlines()[0]
    found = re.search(r"^# Hardware: (one|\d+) GPUs?\b", text, re.MULTILINE)
    gpus = 1 if found is None or found[1] == "one" else int(found[1])
    given = command.removeprefix("# ").partition(" -m pipeline ")[2].split()
    assert {each.partition("=")[0] for each in given} <= {"stage", "recipe", "data.path"}  # so the recipe shards
    is_sharded = composed(f"recipe={recipe}", "stage=all").sharding is not Sharding.none
    assert (processes_of(command), is_sharded) == (gpus, gpus > 1)


def processes_of(command: str) -> int:
    """Return the number of processes that a command line starts."""
    if not command.startswith("# torchrun "):
        assert command.startswith("# python ")
        return 1
    flags = dict(re.findall(r"--(nnodes|nproc-per-node) (\d+)", command))
    return int(flags.get("nnodes", 1)) * int(flags["nproc-per-node"])


def test_every_choice_of_every_group_resolves() -> None:
    by_group: dict[str, list[str]] = {}
    for choice in choices():
        by_group.setdefault(choice.partition("=")[0], []).append(choice)
    for i in range(max(map(len, by_group.values()))):
        one_of_each = [found[i % len(found)] for found in by_group.values()]
        resolved("stage=upcast", *one_of_each, SYNTHETIC_DATA)  # no rule concerns upcast


def test_a_value_that_is_taken_away_is_missed() -> None:
    with pytest.raises(UserError, match=r"^sft\.lora\.targets: is not set"):
        resolved("recipe=smoke", "stage=sft", "sft.lora.targets=???")


def test_a_configuration_without_types_gets_those_of_the_schema() -> None:
    plain = OmegaConf.create(OmegaConf.to_container(composed("recipe=smoke", "stage=sft")))
    assert rules.resolve(plain) == resolved("recipe=smoke", "stage=sft")
    plain.sft.epochs = "many"
    with pytest.raises(UserError, match=r"sft\.epochs: Value 'many'"):
        rules.resolve(plain)


def test_the_method_is_chosen_separately_for_each_stage() -> None:
    found = resolved("stage=sft", "train@qat=lora", SYNTHETIC_DATA)
    assert (found.sft.method, found.qat.method) == (Method.full, Method.lora)


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults() -> None:
    found = resolved("recipe=smoke", "stage=sft", "sft.max_steps=7")
    assert found.sft.max_steps == 7
    assert found.sft.batch_size == 8
    assert found.sft.precision is Precision.fp32


def test_a_stage_gets_the_resolved_configuration(seen: list[PipelineConfig], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_program("stage=qat", "recipe=smoke_lora", f"run_dir={run_dir}", "qat.batch_size=3") == 0
    (found,) = seen
    assert type(found) is PipelineConfig and type(found.qat.lora) is LoraConfig
    assert (found.stage, found.recipe, found.run_dir) == (Stage.qat, "smoke_lora", str(run_dir))
    assert (found.qat.batch_size, found.qat.method) == (3, Method.lora)
    assert found.qat.lora.targets == [LoraTarget.attention, LoraTarget.experts]


def test_a_sweep_runs_each_value(seen: list[PipelineConfig]) -> None:
    arguments = ("-m", "stage=sft", "recipe=smoke", "sft.learning_rate=1e-5,2e-5", "run_dir=runs/${sft.learning_rate}")
    assert run_program(*arguments) == 0
    assert [(found.sft.learning_rate, found.run_dir) for found in seen] == [
        (1e-5, "runs/1e-05"),
        (2e-5, "runs/2e-05"),
    ]


def test_cfg_job_prints_the_configuration_and_runs_nothing(
    seen: list[PipelineConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("--cfg", "job", "stage=sft", "recipe=smoke") == 0
    assert capsys.readouterr().out.strip() == OmegaConf.to_yaml(composed("stage=sft", "recipe=smoke")).strip()
    assert seen == []


def test_nothing_is_written_to_the_working_directory(seen: list[PipelineConfig], tmp_path: Path) -> None:
    assert run_program("stage=sft", "recipe=smoke") == 0
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_writes_nothing_to_the_working_directory(seen: list[PipelineConfig], tmp_path: Path) -> None:
    assert run_program("-m", "stage=sft", "recipe=smoke") == 0
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_run_leaves_no_state_of_hydra_to_the_next(mistake: Mistake) -> None:
    mistake("stage=sft", "recipe=smoke", "~sft.learning_rate")
    assert not GlobalHydra.instance().is_initialized()


def test_a_recipe_from_config_dir_has_its_own_name_and_run_directory(
    seen: list[PipelineConfig], tmp_path: Path
) -> None:
    write_recipe(tmp_path, "sft:\n  learning_rate: 0.5\n")
    assert run_program("--config-dir", str(tmp_path), "stage=sft", "recipe=mine") == 0
    assert (seen[0].recipe, seen[0].run_dir, seen[0].sft.learning_rate) == ("mine", "runs/mine", 0.5)
