"""Bounds of settings, and rules between them."""

import math
from typing import Any

import pytest

from config.composing import Mistake, broken
from pipeline.config import (
    BlendPartConfig,
    ColumnsConfig,
    Experts,
    ExpertsImplementation,
    FormatName,
    LoraConfig,
    Method,
    Oscillation,
    Precision,
    QuantizeSource,
    RoundingMethod,
    RoundingScales,
    ScaleRule,
    Sharding,
    Stage,
    TrackingBackend,
    TrackingConfig,
    TrainConfig,
    Upload,
    ValidationConfig,
    adapted_layers,
    is_known,
    keeps_packed,
    raise_if_nothing_to_round,
)
from pipeline.config.targets import advise_target
from pipeline.errors import UserError

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


@pytest.mark.parametrize(
    "key",
    [
        *("run_dir", "base_run", "model.path", "data.path", "data.validation.path", "sft.start", "export.source"),
        *("evaluate.source", "evaluate.prompts.path", "evaluate.lm_eval.include_path", "verify.checkpoint"),
        *("verify.reference", "verify.python.vllm", "serve.program", "compare.name", "data.columns.role"),
    ],
)
@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_text_is_refused_since_an_empty_path_would_be_the_working_directory(key: str, value: str) -> None:
    assert [problem for problem in broken(**{key.replace(".", "__"): value}) if problem.startswith(f"{key}:")] == [
        f"{key}: is empty, as if a shell variable were not set. Give it a value, or leave it out."
    ]


def test_an_empty_run_to_compare_is_refused() -> None:
    assert broken(compare__runs=["runs/smoke", ""]) == [
        "compare.runs=['runs/smoke', '']: must be directories or patterns, none of them empty."
    ]


def test_tensorboard_cannot_store_weights() -> None:
    chosen = TrackingConfig(backend=TrackingBackend.tensorboard, upload=Upload.models)
    assert broken(tracking=chosen) == [
        "tracking.upload=models: TensorBoard stores no weights. Use tracking.upload=report, or tracking=mlflow."
    ]


def test_the_defaults_break_no_rule() -> None:
    assert broken() == []


def test_lora_without_targets_is_refused_but_not_when_training_in_full() -> None:
    assert broken(sft__lora__targets=[]) == []
    expected = "sft.lora.targets=[]: LoRA needs at least one of attention, experts."
    assert broken(sft__method=Method.lora, sft__precision=Precision.bf16, sft__lora__targets=[]) == [expected]


def test_every_nth_adapts_the_last_layer_of_each_n() -> None:
    assert adapted_layers(LoraConfig(every_nth=8), 24) == [7, 15, 23]
    assert adapted_layers(LoraConfig(every_nth=8), 36) == [7, 15, 23, 31]
    assert adapted_layers(LoraConfig(every_nth=1), 3) == adapted_layers(LoraConfig(), 3) == [0, 1, 2]
    assert adapted_layers(LoraConfig(layers=[2, 0]), 3) == [2, 0]


def test_stochastic_rounding_needs_bf16_weights_and_a_supporting_optimizer() -> None:
    right = {"sft__precision": Precision.bf16, "sft__optimizer": "adamw_torch_8bit", "sft__stochastic_rounding": True}
    assert broken(**right) == []
    assert broken(sft__stochastic_rounding=True) == [
        "sft.stochastic_rounding=true: applies only to training of BF16 weights. No BF16 weights are trained"
        " if sft.method=full and sft.precision=mixed_bf16. Set it to false.",
        "sft.stochastic_rounding=true: sft.optimizer=adamw_torch_fused does not support it. Use one of"
        " adamw_torch_8bit, adamw_torch_4bit, which need pip install 'gpt-oss-qat[torchao]'.",
    ]
    assert len(broken(**right, sft__method=Method.lora)) == 1


def test_only_fsdp2_can_keep_layers_gathered() -> None:
    assert broken(sharding=Sharding.fsdp2, qat__reshard_after_forward=False) == []
    expected = "qat.reshard_after_forward=false: applies only to sharding=fsdp2, not zero3. Set it to true."
    assert broken(sharding=Sharding.zero3, qat__reshard_after_forward=False) == [expected]


def test_layers_and_every_nth_together_are_refused() -> None:
    assert broken(sft__lora__layers=[1], sft__lora__every_nth=2) == [
        "sft.lora.layers=[1], sft.lora.every_nth=2: set only one of them. The other must be null."
    ]


def test_a_kernel_that_skips_quantizers_of_the_format_is_refused_for_qat() -> None:
    w4a4 = {"format__name": FormatName["nvfp4_w4a4"], "format__scale_rule": ScaleRule["mse"]}
    assert broken(**w4a4, qat__experts_implementation=ExpertsImplementation.batched_mm) == []
    assert broken(qat__experts_implementation=ExpertsImplementation.grouped_mm) == []
    assert broken(**w4a4, sft__experts_implementation=ExpertsImplementation.grouped_mm) == []
    assert broken(**w4a4, qat__experts_implementation=ExpertsImplementation.grouped_mm) == [
        "qat.experts_implementation=grouped_mm: skips the input quantizers of down_proj."
        " format=nvfp4_w4a4 needs them. Use one of auto, eager, batched_mm."
    ]


def test_oscillating_weights_can_be_held_if_they_are_trained_and_not_copied() -> None:
    hold = {"qat__oscillation": Oscillation.hold}
    for sharding in (Sharding.none, Sharding.fsdp2):
        assert broken(**hold, sharding=sharding) == []
    assert broken(qat__oscillation=Oscillation.none, sharding=Sharding.zero3, qat__method=Method.bf16_parts) == []


def test_weights_that_cannot_be_held_are_refused_with_the_reason() -> None:
    hold = {"qat__oscillation": Oscillation.hold}
    for settings in (
        {"qat__method": Method.lora, "qat__precision": Precision.bf16},
        {"qat__method": Method.bf16_parts},
    ):
        (problem,) = broken(**hold, **settings)
        name = settings["qat__method"].name
        assert f"holds weights of the experts, but qat.method={name} does not train them. Use train@qat=full" in problem
    for sharding in (Sharding.zero2, Sharding.zero3):
        assert broken(**hold, sharding=sharding) == [
            f"qat.oscillation=hold: cannot hold weights with sharding={sharding.name}, because DeepSpeed overwrites"
            " held weights with its own copies. Use sharding=fsdp2, or set qat.oscillation=none."
        ]
    (problem,) = broken(**hold, format__importance=True, format__scale_rule=ScaleRule["mse"])
    assert "qat.oscillation=hold: rounds without format.importance" in problem


def test_sft_and_qat_with_different_adapters_are_refused_with_both() -> None:
    both = {f"{stage}__method": Method.lora for stage in ("sft", "qat")}
    both |= {f"{stage}__precision": Precision.bf16 for stage in ("sft", "qat")}
    assert broken(**both, sft__lora__rank=4, qat__lora__rank=4) == []
    assert broken(**both, sft__lora__rank=4, qat__lora__layers=[1]) == [
        "qat.lora={rank: 8, alpha: 16, targets: ['attention', 'experts'], layers: [1], every_nth: None} differs from"
        " sft.lora={rank: 4, alpha: 16, targets: ['attention', 'experts'], layers: None, every_nth: None}:"
        " QAT continues with SFT's adapters. Give both the same values."
    ]


def test_rounded_experts_are_a_new_base_so_their_adapters_may_differ_from_those_of_sft() -> None:
    both = {f"{stage}__method": Method.lora for stage in ("sft", "qat")}
    both |= {f"{stage}__precision": Precision.bf16 for stage in ("sft", "qat")}
    assert broken(**both, quantize__method=RoundingMethod.stochastic, qat__lora__rank=4) == []


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_w4a4"])
@pytest.mark.parametrize(
    "settings",
    [{"quantize__method": RoundingMethod.stochastic}, {"quantize__scales": RoundingScales.floor}],
    ids=["stochastic", "scales"],
)
def test_rounded_experts_need_a_rule_that_keeps_them(settings: dict[str, Any], name: str) -> None:
    nvfp4 = {"format__name": FormatName[name], **settings}
    assert broken(**nvfp4, format__scale_rule=ScaleRule["mse"]) == []
    (problem,) = broken(**nvfp4, format__scale_rule=ScaleRule["nearest"])
    assert "only format.scale_rule=mse keeps their values, not nearest" in problem
    (problem,) = broken(**nvfp4, format__scale_rule=ScaleRule["mse"], format__importance=True)
    assert "Set format.importance=false" in problem
    for rule in ("ceil", "floor", "mse"):
        assert broken(**settings, format__scale_rule=ScaleRule[rule]) == []


def test_different_adapter_settings_are_fine_when_only_one_stage_uses_them() -> None:
    assert broken(qat__method=Method.lora, qat__precision=Precision.bf16, sft__lora__rank=4) == []


LORA, FULL, PARTS = Method.lora, Method.full, Method.bf16_parts


@pytest.mark.parametrize(
    ("sft", "qat", "source", "refused"),
    [
        (FULL, FULL, QuantizeSource.sft, "sft"),
        (FULL, LORA, QuantizeSource.sft, "sft"),
        (LORA, FULL, QuantizeSource.sft, None),
        (LORA, FULL, QuantizeSource.upcast, "qat"),
        (FULL, LORA, QuantizeSource.upcast, None),
    ],
)
def test_packed_experts_are_refused_if_the_first_training_is_full(
    sft: Method, qat: Method, source: QuantizeSource, refused: str | None
) -> None:
    settings = {"upcast__experts": Experts.packed, "quantize__source": source}
    for name, method in (("sft", sft), ("qat", qat)):
        settings |= {f"{name}__method": method, f"{name}__precision": Precision.bf16}
    assert broken(**settings) == [
        f"upcast.experts=packed: {name}.method=full trains the experts' weights, which is impossible while they are"
        f" packed. Set upcast.experts=bf16, or {name}.method={'lora or bf16_parts' if name == 'sft' else 'lora'}."
        for name in filter(None, [refused])
    ]


@pytest.mark.parametrize("is_mxfp4", [True, False])
@pytest.mark.parametrize("method", Method)
def test_by_default_experts_are_packed_for_bf16_parts_and_stay_packed_for_lora(method: Method, is_mxfp4: bool) -> None:
    assert keeps_packed(None, method, is_mxfp4=is_mxfp4) == (method is PARTS or (method is LORA and is_mxfp4))
    assert keeps_packed(Experts.packed, method, is_mxfp4=is_mxfp4)
    assert not keeps_packed(Experts.bf16, method, is_mxfp4=is_mxfp4)


def test_bf16_parts_beside_experts_in_bf16_are_refused() -> None:
    (problem,) = broken(sft__method=PARTS, upcast__experts=Experts.bf16)
    assert problem.startswith("upcast.experts=bf16: sft.method=bf16_parts does not train the experts' weights.")
    assert broken(qat__method=PARTS, upcast__experts=Experts.bf16) == broken(sft__method=PARTS) == []


def test_after_bf16_parts_there_is_nothing_to_round_to_mxfp4() -> None:
    parts, source, mxfp4 = TrainConfig(method=PARTS), QuantizeSource.sft, FormatName["mxfp4"]
    with pytest.raises(UserError, match=r"sft\.method=bf16_parts: there is nothing to round\."):
        raise_if_nothing_to_round(source, parts, mxfp4)
    raise_if_nothing_to_round(source, parts, FormatName["nvfp4"])
    raise_if_nothing_to_round(source, TrainConfig(), mxfp4)


def test_qat_of_bf16_parts_without_sft_is_refused() -> None:
    (problem,) = broken(qat__method=PARTS, quantize__source=QuantizeSource.upcast)
    assert "there is nothing to round. Use train@sft=bf16_parts" in problem


def test_lora_under_autocast_is_refused() -> None:
    (problem,) = broken(sft__method=Method.lora, sft__precision=Precision.mixed_bf16)
    assert problem.startswith("sft.precision=mixed_bf16: not with LoRA")


def test_keeping_the_best_weights_needs_a_checkpoint_of_every_evaluation() -> None:
    assert broken(qat__save_steps=50, qat__eval_steps=25, qat__keep_best=False) == []
    (problem,) = broken(qat__save_steps=50, qat__eval_steps=25)
    assert problem.startswith("qat.save_steps=50, qat.eval_steps=25: must be equal, because qat.keep_best=true")


def test_early_stopping_without_the_best_weights_is_refused() -> None:
    assert broken(sft__early_stopping_patience=3) == []
    (problem,) = broken(sft__early_stopping_patience=3, sft__keep_best=False)
    assert problem.startswith("sft.early_stopping_patience=3: needs sft.keep_best=true")


BAD_COLUMNS = {
    "two forms": {"prompt": "a", "completion": "b"},
    "two forms, one incomplete": {"prompt": "a"},
    "no form": {"messages": None},
    "one form, incomplete": {"messages": None, "prompt": "a"},
}


@pytest.mark.parametrize("columns", BAD_COLUMNS.values(), ids=BAD_COLUMNS.keys())
def test_columns_are_either_messages_or_prompt_and_completion(columns: dict[str, Any]) -> None:
    of_data = ColumnsConfig(**columns)
    part = BlendPartConfig(path="a", weight=1.0, columns=of_data)
    (problem,) = broken(data__columns=of_data)
    (problem_of_part,) = broken(data__path=None, data__blend=[part])
    assert problem.startswith(f"data.columns: messages={of_data.messages!r}, prompt={of_data.prompt!r} and completion=")
    assert problem_of_part == problem.replace("data.", "data.blend[0].", 1)


def test_a_reasoning_column_needs_a_completion_column() -> None:
    expected = "data.columns.reasoning='why': needs data.columns.completion, which is null."
    assert broken(data__columns=ColumnsConfig(reasoning="why")) == [expected]


def test_an_input_column_needs_a_prompt_column() -> None:
    expected = "data.columns.input='input': needs data.columns.prompt, which is null."
    assert broken(data__columns=ColumnsConfig(input="input")) == [expected]


VALIDATION: dict[str, tuple[dict[str, Any], str]] = {
    "the same path": ({"path": "a"}, "data.validation.path=a, data.validation.split=null: these are the training rows"),
    "the same split": ({"split": "train"}, "data.validation.path=null, data.validation.split=train: these are the"),
    "neither path nor split": ({"filter": {"kind": ["x"]}}, "data.validation.filter: needs data.validation.path or"),
    "columns that do not go together": (
        {"path": "b", "columns": ColumnsConfig(prompt="x")},
        "data.validation.columns: messages='messages', prompt='x'",
    ),
    "a language of two lines": (
        {"path": "b", "reasoning_language": "a\nb"},
        "data.validation.reasoning_language='a\\nb': must be one line",
    ),
}


@pytest.mark.parametrize(("settings", "message"), VALIDATION.values(), ids=VALIDATION.keys())
def test_validation_data_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    (problem,) = broken(data__path="a", data__validation=ValidationConfig(**settings))
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "settings",
    [{"path": "b"}, {"split": "test"}, {"path": "a", "split": "test"}, {"path": "a", "filter": {"kind": ["x"]}}, {}],
)
def test_validation_data_of_ones_own_are_allowed(settings: dict[str, Any]) -> None:
    assert broken(data__path="a", data__validation=ValidationConfig(**settings)) == []


def test_a_split_for_validation_needs_a_path_beside_a_blend() -> None:
    parts = [BlendPartConfig(path="a", weight=1.0)]
    (problem,) = broken(data__path=None, data__blend=parts, data__validation=ValidationConfig(split="test"))
    assert problem.startswith("data.validation.split=test: needs data.path, which is not set.")


def test_a_path_and_a_blend_together_are_refused() -> None:
    parts = [BlendPartConfig(path="a", weight=1.0)]
    assert broken(data__path=None, data__blend=parts) == []
    (problem,) = broken(data__path="b", data__blend=parts)
    assert problem.startswith("data.path='b': cannot be combined with data.blend")


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_is_greater_than_0(weight: float) -> None:
    parts = [BlendPartConfig(path="a", weight=1.0), BlendPartConfig(path="b", weight=weight)]
    assert broken(data__path=None, data__blend=parts) == [f"data.blend[1].weight={weight!r}: must be greater than 0."]


@pytest.mark.parametrize("text", ["You are\nAda.", "<|end|>"])
@pytest.mark.parametrize("key", ["model_identity", "reasoning_language"])
def test_texts_for_the_prompt_are_one_line(key: str, text: str) -> None:
    expected = f"data.{key}={text!r}: must be one line of text, without special tokens."
    assert broken(**{f"data__{key}": text}) == [expected]


def test_mappings_accept_any_names() -> None:
    assert is_known("data.roles.human") and is_known("data.filter.category")
    assert not is_known("data.role.human")


def test_several_broken_rules_are_reported_together(mistake: Mistake) -> None:
    arguments = ("data.validation_fraction=2", "sft.learning_rate=0", "qat.max_steps=-2")
    assert mistake("stage=sft", "recipe=smoke", *arguments).splitlines() == [
        "3 problems:",
        "  - data.validation_fraction=2.0: must be between 0 and 1, both excluded.",
        "  - sft.learning_rate=0.0: must be greater than 0.",
        "  - qat.max_steps=-2: must be a number of steps, or -1.",
    ]


@pytest.mark.parametrize(
    ("name", "targets"), [("nvfp4", "Set export.target=nvfp4 or bf16"), ("nvfp4_w4a4", "Set export.target=nvfp4")]
)
def test_a_target_that_cannot_hold_the_format_names_those_that_can(name: str, targets: str) -> None:
    (problem,) = broken(stage=Stage.all, format__name=FormatName[name])
    assert problem == (
        f"export.target=mxfp4: cannot hold format={name}, only mxfp4. {targets}, or train for another format."
    )


def test_a_format_without_a_target_can_be_trained_without_an_export() -> None:
    assert advise_target("toy") == (
        "Do not export: instead of stage=all, run the stages up to qat one by one, then stage=evaluate"
    )
