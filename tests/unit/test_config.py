"""The command line and the configuration: what composes, what is refused and in which words, and the help."""

import ast
import copy
import dataclasses
import inspect
import math
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from conftest import run_program
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from pipeline import __main__ as program
from pipeline import command_line, config, rules
from pipeline.config import (
    BlendPartConfig,
    ColumnsConfig,
    DataConfig,
    ExpertsImplementation,
    FormatName,
    LoraConfig,
    LoraTarget,
    Method,
    ModelConfig,
    PipelineConfig,
    Precision,
    ScaleRule,
    Stage,
)
from pipeline.errors import CheckFailed, UserError
from pipeline.rules import adapted_layers

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in program.RECIPES_DIR.glob("*.yaml"))
STAGES = [stage.name for stage in Stage]
SYNTHETIC_DATA = "data.path=synthetic://arithmetic"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As main() sets it, nothing of a distributed launcher, and an empty directory to be called in."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@lru_cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    program.register()
    with initialize_config_dir(str(program.CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides))


def composed(*overrides: str) -> DictConfig:
    return copy.deepcopy(_composed(overrides))


def resolved(*overrides: str) -> PipelineConfig:
    return rules.resolve(composed(*overrides))


def found_on(*arguments: str) -> str:
    """The one mistake that is found on a command line before anything is composed."""
    (problem,) = command_line.problems(list(arguments), program.CONF_DIR, program.RECIPES_DIR)
    return problem


def broken(**settings: Any) -> list[str]:
    """The rules that a configuration breaks with these settings; two underscores stand for a dot."""
    changed = PipelineConfig(stage=Stage.sft, model=ModelConfig(path="model"), data=DataConfig(path="data"))
    for key, value in settings.items():
        *sections, name = key.split("__")
        setattr(reduce(getattr, sections, changed), name, value)
    return rules.problems(changed)


Run = Callable[[PipelineConfig], None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[PipelineConfig]:
    """Stages that only note down the configuration that they are given."""
    configs: list[PipelineConfig] = []
    replace_stages(monkeypatch, configs.append)
    return configs


def replace_stages(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    for name in STAGES:
        module = types.ModuleType(f"pipeline.stages.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)


Mistake = Callable[..., str]


@pytest.fixture
def mistake(seen: list[PipelineConfig], capsys: pytest.CaptureFixture[str]) -> Mistake:
    """The message that a command line is refused with: status 2, one error, no traceback, and no stage has run."""

    def message_of(*arguments: str) -> str:
        capsys.readouterr()
        assert run_program(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        assert captured.err.count("error: ") == 1 and captured.err.startswith("error: ")
        assert seen == []
        return captured.err.removeprefix("error: ").rstrip("\n")

    return message_of


def one_line(message: str) -> str:
    assert "\n" not in message
    return message


# --- what composes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves_for_every_stage(recipe: str) -> None:
    node = composed(f"recipe={recipe}", "stage=all")
    for stage in Stage:
        node.stage = stage
        node.run_dir = "runs/${recipe}"
        found = rules.resolve(node)
        assert (found.stage, found.recipe, found.run_dir) == (stage, recipe, f"runs/{recipe}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_opens_with_its_own_command(recipe: str) -> None:
    first = (program.RECIPES_DIR / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and "-m pipeline " in first
    arguments = first.partition("-m pipeline ")[2].split()
    assert f"recipe={recipe}" in arguments
    assert command_line.problems(arguments, program.CONF_DIR, program.RECIPES_DIR) == []


def choices() -> list[str]:
    groups = {"train": ("train@sft", "train@qat")}
    return [
        f"{key}={path.stem}"
        for path in sorted(program.CONF_DIR.glob("*/*.yaml"))
        for key in groups.get(path.parent.name, (path.parent.name,))
    ]


def test_every_choice_of_every_group_resolves() -> None:
    by_group: dict[str, list[str]] = {}
    for choice in choices():
        by_group.setdefault(choice.partition("=")[0], []).append(choice)
    for i in range(max(map(len, by_group.values()))):
        one_of_each = [found[i % len(found)] for found in by_group.values()]
        resolved("stage=upcast", *one_of_each, SYNTHETIC_DATA)  # no stage that a choice would be refused for


def test_lora_is_chosen_for_each_stage_on_its_own() -> None:
    found = resolved("stage=sft", "train@qat=lora", SYNTHETIC_DATA)
    assert (found.sft.method, found.qat.method) == (Method.full, Method.lora)


def test_qat_has_a_lower_rate_than_sft_unless_a_recipe_says_otherwise() -> None:
    found = resolved("stage=sft", SYNTHETIC_DATA)
    assert (found.sft.learning_rate, found.qat.learning_rate) == (2e-5, 1e-5)


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


def test_nothing_is_written_where_the_program_is_called(seen: list[PipelineConfig], tmp_path: Path) -> None:
    assert run_program("stage=sft", "recipe=smoke") == 0
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_writes_nothing_where_it_is_called(seen: list[PipelineConfig], tmp_path: Path) -> None:
    assert run_program("-m", "stage=sft", "recipe=smoke") == 0
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_run_leaves_no_state_of_hydra_to_the_next(mistake: Mistake) -> None:
    mistake("stage=sft", "recipe=smoke", "~sft.learning_rate")
    assert not GlobalHydra.instance().is_initialized()


def test_a_recipe_in_a_folder_of_the_users_has_its_own_name_and_run_directory(
    seen: list[PipelineConfig], tmp_path: Path
) -> None:
    write_recipe(tmp_path, "sft:\n  learning_rate: 0.5\n")
    assert run_program("--config-dir", str(tmp_path), "stage=sft", "recipe=mine") == 0
    assert (seen[0].recipe, seen[0].run_dir, seen[0].sft.learning_rate) == ("mine", "runs/mine", 0.5)


def write_recipe(folder: Path, text: str) -> None:
    (folder / "recipe").mkdir()
    (folder / "recipe" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /model: tiny\n  - override /data: arithmetic\n\n{text}"
    )


# --- unknown names ---------------------------------------------------------------------------------------------------

MISSPELT = {
    "sft.learning_rat=1": "'sft.learning_rate'",
    "stge=sft": "'stage'",
    "data.max_sample=1": "'data.max_samples'",
    "learning_rate=1": "'sft.learning_rate'",
    "sft.lora.rang=4": "'sft.lora.rank'",
    "exprot.source=qat": "'export.source'",
}


@pytest.mark.parametrize(("argument", "meant"), MISSPELT.items())
def test_a_misspelt_key_is_refused_with_the_right_one(argument: str, meant: str) -> None:
    message = one_line(found_on(argument))
    assert message.startswith(f"{argument}: unknown key '{argument.partition('=')[0]}'. Did you mean {meant}")


def test_an_unknown_key_is_refused_with_the_way_to_all_keys() -> None:
    message = one_line(found_on("xyzzy=1"))
    assert message == "xyzzy=1: unknown key 'xyzzy'. `--help` lists all keys."


@pytest.mark.parametrize("argument", ["+sft.lr=1", "++sft.lr=1", "+foo=1", "+sft.lora.bias=none"])
def test_a_plus_adds_no_key(argument: str) -> None:
    message = one_line(found_on(argument))
    assert message.startswith(f"{argument}: unknown key '{argument.lstrip('+').partition('=')[0]}'.")


def test_resolve_refuses_keys_that_were_added_past_the_schema() -> None:
    node = composed("recipe=smoke", "stage=sft")
    OmegaConf.set_struct(node, False)
    OmegaConf.update(node, "sft.lr", 1, force_add=True)
    OmegaConf.update(node, "foo", {"bar": 1}, force_add=True)
    with pytest.raises(UserError) as caught:
        rules.resolve(node)
    assert "unknown key 'sft.lr'" in str(caught.value)
    assert "unknown key 'foo.bar'" in str(caught.value)


def test_a_misspelt_key_in_a_recipe_is_refused_with_its_full_name(mistake: Mistake, tmp_path: Path) -> None:
    write_recipe(tmp_path, "sft:\n  learning_rat: 0.5\n")
    message = mistake("--config-dir", str(tmp_path), "stage=sft", "recipe=mine")
    assert "recipe/mine" in message
    assert "sft.learning_rat" in message


def test_a_value_of_the_wrong_type_in_a_recipe_is_refused_with_its_full_key(mistake: Mistake, tmp_path: Path) -> None:
    write_recipe(tmp_path, "sft:\n  learning_rate: fast\n")
    message = mistake("--config-dir", str(tmp_path), "stage=sft", "recipe=mine")
    assert "sft.learning_rate" in message
    assert "fast" in message


UNKNOWN_CHOICES = {
    "recipe=smok": " Did you mean 'smoke'",
    "recipe=": "",
    "format=mxfp5": " Did you mean 'mxfp4'",
    "model=gpt_oss_12b": " Did you mean 'gpt_oss_120b'",
    "data=poems": "",
    "train@sft=lor": " Did you mean 'lora'",
    "train@qat=dora": " Did you mean 'lora'",
}


@pytest.mark.parametrize(("argument", "meant"), UNKNOWN_CHOICES.items())
def test_an_unknown_choice_of_a_group_is_refused_with_all_choices(argument: str, meant: str) -> None:
    message = one_line(found_on(argument))
    group = argument.partition("=")[0].partition("@")[0]
    folder = program.RECIPES_DIR if group == "recipe" else program.CONF_DIR / group
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    assert message.startswith(f"{argument}: no such choice.{meant}")
    assert message.endswith(f" Choose from: {names}.")


def test_no_recipe_is_a_choice_too(seen: list[PipelineConfig]) -> None:
    assert run_program("stage=sft", "recipe=null", SYNTHETIC_DATA) in (0, 2)


def test_train_without_a_stage_is_refused_with_the_two_ways() -> None:
    message = one_line(found_on("train=lora"))
    assert message == "train: say for which stage: train@sft=lora or train@qat=lora."


def test_an_unknown_stage_is_refused_with_all_stages() -> None:
    message = one_line(found_on("stage=sftt"))
    assert message == f"stage='sftt': Invalid value 'sftt', expected one of [{', '.join(STAGES)}]"


# --- wrong values ----------------------------------------------------------------------------------------------------

WRONG_TYPES = {
    "sft.learning_rate=fast": "sft.learning_rate='fast': Value 'fast' of type 'str' could not be converted to Float",
    "sft.max_steps=1.5": "sft.max_steps=1.5: Value '1.5' of type 'float' could not be converted to Integer",
    "overwrite=maybe": "overwrite='maybe': Value 'maybe' is not a valid bool (type str)",
    "sft.method=dora": "sft.method='dora': Invalid value 'dora', expected one of [full, lora]",
    "sft.batch_size=null": "sft.batch_size=None: field 'sft.batch_size' is not Optional",
    "model.path=null": "model.path=None: field 'model.path' is not Optional",
    "qat.lora.targets=[attention,router]": "qat.lora.targets=['attention', 'router']: Invalid value 'router', expected"
    " one of [attention, experts]",
    "sft=3": "sft=3: Invalid type assigned: int is not a subclass of TrainConfig. value: 3",
}


@pytest.mark.parametrize(("argument", "expected"), WRONG_TYPES.items())
def test_a_value_of_the_wrong_type_is_refused(argument: str, expected: str) -> None:
    assert one_line(found_on(argument)) == expected


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("stage=sft,exprot", "'exprot', expected one of [doctor, "),
        ("sft.learning_rate=1e-5,fast", "'fast' of type 'str' could not be converted to Float"),
        ("sft.precision=fp32,fp16", "'fp16', expected one of [fp32, mixed_bf16, bf16]"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_sweep_is_refused_before_it_starts(argument: str, reason: str) -> None:
    assert reason in found_on("-m", argument)


@pytest.mark.parametrize("argument", ["sft.learning_rate=[", "sft={learning_rate:1", "run_dir=a=b"])
def test_a_value_that_cannot_be_parsed_is_refused_with_the_argument(argument: str) -> None:
    assert one_line(found_on(argument)).startswith(f"{argument}: ")


def test_several_values_without_the_sweep_flag_are_refused(mistake: Mistake) -> None:
    message = one_line(mistake("stage=sft", "recipe=smoke", "sft.learning_rate=1e-5,2e-5"))
    assert "sft.learning_rate=1e-5,2e-5" in message


def test_a_missing_stage_is_refused_with_all_stages(mistake: Mistake) -> None:
    message = one_line(mistake("recipe=smoke"))
    assert message == f"stage: is not set. Give stage=<value>. Choose one of: {', '.join(STAGES)}."


def test_missing_values_are_reported_together_with_their_full_keys(mistake: Mistake) -> None:
    assert [line.partition(": ")[0] for line in mistake("model.path=???").splitlines()[1:]] == [
        "  - model.path",
        "  - stage",
    ]


def test_several_mistakes_are_reported_together(mistake: Mistake) -> None:
    message = mistake("stage=sft", "sft.lr=1", "qat.lr=1", "data.validation_fraction=few", "recipe=smok")
    first, *others = message.splitlines()
    assert first == "4 problems:"
    starts = [line.removeprefix("  - ").partition(":")[0] for line in others]
    assert starts == ["sft.lr=1", "qat.lr=1", "data.validation_fraction='few'", "recipe=smok"]


# --- rules between settings ------------------------------------------------------------------------------------------

BROKEN_RULES: dict[str, tuple[Any, str]] = {
    "data.validation_fraction": (2.0, "must be between 0 and 1, both excluded."),
    "data.max_samples": (0, "must be greater than 0."),
    "data.max_length": (-5, "must be greater than 0."),
    "sft.learning_rate": (0.0, "must be greater than 0."),
    "qat.learning_rate": (math.nan, "must be greater than 0."),
    "sft.warmup_ratio": (1.0, "must be 0 or more and below 1."),
    "sft.max_steps": (0, "must be a number of steps, or -1."),
    "qat.max_steps": (-2, "must be a number of steps, or -1."),
    "sft.early_stopping_patience": (0, "must be greater than 0."),
    "sft.lora.rank": (0, "must be greater than 0."),
    "sft.lora.every_nth": (0, "must be greater than 0."),
    "sft.router_aux_loss_coef": (-0.5, "must be 0 or more."),
    "quantize.calibration_samples": (0, "must be greater than 0."),
    "verify.logits_tolerance": (-1.0, "must be 0 or more."),
    "model.tiny.hidden_size": (33, "must be a positive multiple of 32, the block size of MXFP4."),
    "model.tiny.intermediate_size": (0, "must be a positive multiple of 32, the block size of MXFP4."),
    "qat.lr_scheduler": (
        "cosinus",
        "must be one of cosine, linear, constant, constant_with_warmup, polynomial, inverse_sqrt.",
    ),
}


@pytest.mark.parametrize(("key", "value", "meaning"), [(key, *rest) for key, rest in BROKEN_RULES.items()])
def test_a_broken_rule_names_full_key_and_value(key: str, value: Any, meaning: str) -> None:
    assert broken(**{key.replace(".", "__"): value}) == [f"{key}={value!r}: {meaning}"]


def test_the_defaults_break_no_rule() -> None:
    assert broken() == []


def test_lora_without_targets_is_refused_but_not_when_training_in_full() -> None:
    assert broken(sft__lora__targets=[]) == []
    expected = "sft.lora.targets=[]: LoRA needs at least one of attention, experts."
    assert broken(sft__method=Method.lora, sft__precision=Precision.bf16, sft__lora__targets=[]) == [expected]


def test_every_eighth_layer_is_the_last_of_each_eight() -> None:
    assert adapted_layers(LoraConfig(every_nth=8), 24) == [7, 15, 23]
    assert adapted_layers(LoraConfig(every_nth=8), 36) == [7, 15, 23, 31]
    assert adapted_layers(LoraConfig(every_nth=1), 3) == adapted_layers(LoraConfig(), 3) == [0, 1, 2]
    assert adapted_layers(LoraConfig(layers=[2, 0]), 3) == [2, 0]


def test_stochastic_rounding_needs_bf16_weights_and_an_optimizer_that_can() -> None:
    right = {"sft__precision": Precision.bf16, "sft__optimizer": "adamw_torch_8bit", "sft__stochastic_rounding": True}
    assert broken(**right) == []
    assert broken(sft__stochastic_rounding=True) == [
        "sft.stochastic_rounding=true: only BF16 weights are rounded, not those of sft.method=full with"
        " sft.precision=mixed_bf16. Set it to false.",
        "sft.stochastic_rounding=true: sft.optimizer=adamw_torch_fused cannot. Use one of adamw_torch_8bit,"
        " adamw_torch_4bit, which need pip install 'gpt-oss-qat[torchao]'.",
    ]
    assert len(broken(**right, sft__method=Method.lora)) == 1


def test_layers_and_every_nth_together_are_refused() -> None:
    assert broken(sft__lora__layers=[1], sft__lora__every_nth=2) == [
        "sft.lora.layers=[1], sft.lora.every_nth=2: give one of them, and null for the other."
    ]


def test_a_kernel_that_passes_by_a_formats_quantizers_is_refused_for_qat() -> None:
    w4a4 = {"format__name": FormatName.nvfp4_w4a4, "format__scale_rule": ScaleRule.mse}
    assert broken(**w4a4, qat__experts_implementation=ExpertsImplementation.batched_mm) == []
    assert broken(qat__experts_implementation=ExpertsImplementation.grouped_mm) == []
    assert broken(**w4a4, sft__experts_implementation=ExpertsImplementation.grouped_mm) == []
    assert broken(**w4a4, qat__experts_implementation=ExpertsImplementation.grouped_mm) == [
        "qat.experts_implementation=grouped_mm: leaves out the quantizers of down_proj's inputs, which"
        " format=nvfp4_w4a4 has. Use one of auto, eager, batched_mm."
    ]


def test_sft_and_qat_with_different_adapters_are_refused_with_both() -> None:
    both = {f"{stage}__method": Method.lora for stage in ("sft", "qat")}
    both |= {f"{stage}__precision": Precision.bf16 for stage in ("sft", "qat")}
    assert broken(**both, sft__lora__rank=4, qat__lora__rank=4) == []
    assert broken(**both, sft__lora__rank=4, qat__lora__layers=[1]) == [
        "qat.lora={rank: 8, alpha: 16, targets: ['attention', 'experts'], layers: [1], every_nth: None} differs from"
        " sft.lora={rank: 4, alpha: 16, targets: ['attention', 'experts'], layers: None, every_nth: None}:"
        " QAT goes on with SFT's adapters. Give both the same values."
    ]


def test_different_adapter_settings_are_fine_when_only_one_stage_uses_them() -> None:
    assert broken(qat__method=Method.lora, qat__precision=Precision.bf16, sft__lora__rank=4) == []


def test_lora_under_autocast_is_refused() -> None:
    (problem,) = broken(sft__method=Method.lora, sft__precision=Precision.mixed_bf16)
    assert problem.startswith("sft.precision=mixed_bf16: not with LoRA")


def test_keeping_the_best_weights_needs_a_checkpoint_of_every_evaluation() -> None:
    assert broken(qat__save_steps=50, qat__eval_steps=25, qat__keep_best=False) == []
    (problem,) = broken(qat__save_steps=50, qat__eval_steps=25)
    assert problem.startswith("qat.save_steps=50, qat.eval_steps=25: must be equal with qat.keep_best=true")


def test_early_stopping_without_the_best_weights_is_refused() -> None:
    assert broken(sft__early_stopping_patience=3) == []
    (problem,) = broken(sft__early_stopping_patience=3, sft__keep_best=False)
    assert problem.startswith("sft.early_stopping_patience=3: needs sft.keep_best=true")


BAD_COLUMNS = {
    "two forms": {"prompt": "a", "completion": "b"},
    "two forms, one by half": {"prompt": "a"},
    "no form": {"messages": None},
    "half a form": {"messages": None, "prompt": "a"},
}


@pytest.mark.parametrize("columns", BAD_COLUMNS.values(), ids=BAD_COLUMNS.keys())
def test_columns_are_of_one_form(columns: dict[str, Any]) -> None:
    of_data = ColumnsConfig(**columns)
    part = BlendPartConfig(path="a", weight=1.0, columns=of_data)
    (problem,) = broken(data__columns=of_data)
    (problem_of_part,) = broken(data__path=None, data__blend=[part])
    assert problem.startswith(f"data.columns: messages={of_data.messages!r}, prompt={of_data.prompt!r} and completion=")
    assert problem_of_part == problem.replace("data.", "data.blend[0].", 1)


def test_reasoning_belongs_to_a_completion() -> None:
    expected = "data.columns.reasoning='why': belongs to completion, which is null."
    assert broken(data__columns=ColumnsConfig(reasoning="why")) == [expected]


def test_a_data_set_and_a_blend_are_not_given_together() -> None:
    parts = [BlendPartConfig(path="a", weight=1.0)]
    assert broken(data__path=None, data__blend=parts) == []
    (problem,) = broken(data__path="b", data__blend=parts)
    assert problem.startswith("data.path='b': not together with data.blend")


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_is_greater_than_0(weight: float) -> None:
    parts = [BlendPartConfig(path="a", weight=1.0), BlendPartConfig(path="b", weight=weight)]
    assert broken(data__path=None, data__blend=parts) == [f"data.blend[1].weight={weight!r}: must be greater than 0."]


@pytest.mark.parametrize("text", ["", "You are\nAda.", "<|end|>"])
@pytest.mark.parametrize("key", ["model_identity", "reasoning_language"])
def test_what_goes_into_the_prompt_is_one_line_of_text(key: str, text: str) -> None:
    expected = f"data.{key}={text!r}: must be one line of text, without special tokens."
    assert broken(**{f"data__{key}": text}) == [expected]


def test_a_mapping_takes_names_of_the_users_own() -> None:
    assert config.is_known("data.roles.human") and config.is_known("data.filter.category")
    assert not config.is_known("data.role.human")


def test_several_broken_rules_are_reported_together(mistake: Mistake) -> None:
    arguments = ("data.validation_fraction=2", "sft.learning_rate=0", "qat.max_steps=-2")
    assert mistake("stage=sft", "recipe=smoke", *arguments).splitlines() == [
        "3 problems:",
        "  - data.validation_fraction=2.0: must be between 0 and 1, both excluded.",
        "  - sft.learning_rate=0.0: must be greater than 0.",
        "  - qat.max_steps=-2: must be a number of steps, or -1.",
    ]


# --- exit status -----------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Run:
    def run(_: PipelineConfig) -> None:
        raise error

    return run


ARGUMENTS = ("stage=sft", "recipe=smoke")


@pytest.mark.parametrize(("error", "status"), [(UserError("this is wrong."), 2), (CheckFailed("not equal."), 1)])
def test_a_mistake_and_a_failed_check_are_one_line_on_stderr(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stages(monkeypatch, raising(error))
    assert run_program(*ARGUMENTS) == status
    captured = capsys.readouterr()
    assert captured.err == f"error: {error}\n"
    assert captured.out == ""


def test_a_bug_keeps_its_traceback_and_leaves_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stages(monkeypatch, raising(RuntimeError("an index is off")))
    assert run_program(*ARGUMENTS) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("RuntimeError: an index is off\n")


def test_an_interruption_leaves_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace_stages(monkeypatch, raising(KeyboardInterrupt()))
    assert run_program(*ARGUMENTS) == 130
    assert (
        capsys.readouterr().err == "error: interrupted; the same command, without overwrite=true, goes on from here\n"
    )


def test_another_process_waits_for_the_main_ones_report_and_speaks_when_it_is_still_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(program.time, "sleep", waited.append)
    replace_stages(monkeypatch, raising(UserError("this is wrong.")))
    assert run_program(*ARGUMENTS) == 2
    assert waited and min(waited) >= 5
    assert capsys.readouterr().err == "error on process 1: this is wrong.\n"


def test_main_exits_with_the_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["pipeline", "stage=sft", "sft.lr=1"])
    with pytest.raises(SystemExit) as leaving:
        program.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("error: sft.lr=1: unknown key")


def test_an_unknown_flag_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(*ARGUMENTS, "--fast") == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err


# --- help ------------------------------------------------------------------------------------------------------------


@cache
def help_text() -> str:
    return command_line.help_text(program.CONF_DIR, program.RECIPES_DIR)


def documented_settings() -> dict[str, dict[str, str | None]]:
    """Read from config.py as text: class -> setting -> the string under it; sections (fields of a *Config) left out."""
    found: dict[str, dict[str, str | None]] = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        fields = found.setdefault(node.name, {})
        for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.annotation).endswith("Config"):
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
                )
                fields[ast.unparse(statement.target)] = text
    return found


def test_no_setting_is_without_a_meaning() -> None:
    settings = documented_settings()
    assert set(settings) >= {"PipelineConfig", "TrainConfig", "DataConfig"}
    assert [f"{name}.{key}" for name, fields in settings.items() for key, text in fields.items() if not text] == []


def sections_of(node: type, prefix: str = "") -> dict[str, list[str]]:
    """Key of a section -> the names of its dataclass and of those that it extends."""
    found = {prefix: [each.__name__ for each in node.__mro__ if dataclasses.is_dataclass(each)]}
    for item in dataclasses.fields(node):
        key = f"{prefix}.{item.name}".lstrip(".")
        if dataclasses.is_dataclass(item.type):
            found |= sections_of(item.type, key)  # type: ignore[arg-type]
        if get_origin(item.type) is list and dataclasses.is_dataclass(element := get_args(item.type)[0]):
            found |= sections_of(element, f"{key}[]")
    return found


def test_the_help_names_every_setting_with_its_meaning() -> None:
    lines = help_text().splitlines()
    sections = sections_of(config.PipelineConfig)
    settings = documented_settings()
    assert set(settings) <= {name for names in sections.values() for name in names}
    for section, names in sections.items():
        for key, meaning in (pair for name in names for pair in settings[name].items()):
            full = f"{section}.{key}".lstrip(".")
            (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  {full} ["))
            assert lines[at + 1].strip() == meaning


def test_the_help_names_every_key_that_the_schema_has() -> None:
    text = help_text()
    shown = {line.split(" [")[0].strip() for line in text.splitlines() if line.startswith("  ") and " [" in line}
    leaves = {key for key in config.setting_keys() if not any(k.startswith(f"{key}.") for k in config.setting_keys())}
    assert leaves <= shown


def test_the_help_names_every_stage_recipe_and_choice() -> None:
    text = help_text()
    stages, groups = (
        {
            line.split()[0]: line.split(None, 1)[1]
            for line in text.partition(f"\n{name}")[2].split("\n\n")[0].splitlines()[1:]
        }
        for name in ("stages", "groups")
    )
    assert list(stages) == STAGES
    assert all(recipe in groups["recipe"] for recipe in RECIPES)
    assert all(choice.partition("=")[2] in groups[choice.partition("=")[0]] for choice in choices())


def test_the_help_shows_defaults_as_they_are_written_on_the_command_line() -> None:
    lines = help_text().splitlines()
    for line in (
        "  overwrite [false]",
        "  data.max_samples [null]",
        "  model.path [required]",
        "  data.path [null]",
        "  sft.precision [mixed_bf16] (fp32 | mixed_bf16 | bf16)",
        "  sft.lora.targets [attention, experts]",
    ):
        assert line in lines


@pytest.mark.parametrize("arguments", [["-h"], ["sft.lr=1", "--help", "recipe=nonsense"]])
def test_the_help_is_shown_whatever_else_is_asked_for(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(*arguments) == 0
    assert capsys.readouterr().out == f"{help_text()}\n"


def seconds_of_children() -> float:
    """Processor time of all processes that this one has waited for; unlike the clock's, not of what else is running."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("arguments", "status", "start"),
    [
        (["--help"], 0, "usage: python -m pipeline"),
        (["stage=sft", "sft.lr=1"], 2, "error: sft.lr=1: unknown key"),
        (["stage=sft", SYNTHETIC_DATA, "sft.learning_rate=0"], 2, "error: sft.learning_rate=0.0: must be"),
    ],
)
def test_help_and_mistakes_answer_within_two_seconds_and_import_nothing_slow(
    arguments: list[str], status: int, start: str
) -> None:
    before = seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert seconds_of_children() - before < 2
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [done.stdout, *(line for line in lines if not line.startswith("import time:"))]
    assert (done.returncode, "".join(said)[: len(start)]) == (status, start)
    assert "hydra" in imported
    assert imported & {"torch", "transformers", "trl", "peft", "modelopt", "datasets", "accelerate"} == set()
