"""What settings must be, alone and together, and how a composed configuration becomes a checked one.

`resolve` turns what Hydra composed into `PipelineConfig`; `problems` holds the rules.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import evaluation_rules
from pipeline.config import (
    ColumnsConfig,
    DataConfig,
    ExpertsImplementation,
    ExportTarget,
    FormatName,
    LoraConfig,
    Method,
    PipelineConfig,
    Precision,
    QuantizeSource,
    ScaleRule,
    Stage,
    TrainConfig,
    is_known,
    schema,
    unknown_key,
)
from pipeline.errors import UserError, user_errors


def resolve(composed: DictConfig) -> PipelineConfig:
    """The composed configuration as plain dataclasses.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value, a broken rule; all rules together.
    """
    # `+sft.lr=1` adds a key to what Hydra composed, and OmegaConf.to_object drops it: a fresh schema refuses it.
    unknown = [key for key in _leaf_keys(composed) if not is_known(key)]
    if unknown:
        raise user_errors([unknown_key(key, "configuration") for key in unknown])
    try:
        merged = OmegaConf.merge(schema(), composed)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise user_errors([_not_set(key) for key in missing])
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"configuration: {key}{str(error).splitlines()[0]}") from error
    assert isinstance(config, PipelineConfig)
    found = problems(config)
    if found:
        raise user_errors(found)
    return config


def problems(config: PipelineConfig) -> list[str]:
    """Every rule that the settings break, each with its full key and value."""
    found = [
        f"{key}={value!r}: must be {rule.meaning}."
        for key, rule in _RULES.items()
        if (value := _select(config, key)) is not None and not rule.holds(value)
    ]
    found += _data_problems(config.data) + evaluation_rules.problems(config.evaluate)
    found += _train_problems("sft", config.sft) + _train_problems("qat", config.qat)
    found += _format_problems(config)
    return found + _qat_problems(config) + _experts_problems(config)


def adapted_layers(lora: LoraConfig, count: int) -> list[int]:
    """The layers, of `count`, that get adapters; `lora.layers` is not checked against it."""
    if lora.every_nth is not None:
        return list(range(lora.every_nth - 1, count, lora.every_nth))
    return list(range(count)) if lora.layers is None else lora.layers


def _train_problems(section: str, train: TrainConfig) -> list[str]:
    found = []
    if train.method is Method.lora and train.precision is Precision.mixed_bf16:
        found.append(
            f"{section}.precision=mixed_bf16: not with LoRA, whose merge autocast would round otherwise than export"
            " does. Use bf16 (the adapters stay FP32) or fp32."
        )
    if train.stochastic_rounding:
        found += _rounding_problems(section, train)
    if train.lr_scheduler not in _SCHEDULERS:
        found.append(f"{section}.lr_scheduler={train.lr_scheduler!r}: must be one of {', '.join(_SCHEDULERS)}.")
    if train.method is Method.lora and not train.lora.targets:
        found.append(f"{section}.lora.targets=[]: LoRA needs at least one of attention, experts.")
    if train.lora.layers is not None and train.lora.every_nth is not None:
        found.append(
            f"{section}.lora.layers={train.lora.layers}, {section}.lora.every_nth={train.lora.every_nth}: give one of"
            " them, and null for the other."
        )
    return found + _keeping_problems(section, train)


def _rounding_problems(section: str, train: TrainConfig) -> list[str]:
    found = []
    if train.method is Method.lora or train.precision is not Precision.bf16:
        found.append(
            f"{section}.stochastic_rounding=true: only BF16 weights are rounded, not those of {section}.method="
            f"{train.method.name} with {section}.precision={train.precision.name}. Set it to false."
        )
    if train.optimizer not in _ROUNDING_OPTIMIZERS:
        found.append(
            f"{section}.stochastic_rounding=true: {section}.optimizer={train.optimizer} cannot. Use one of"
            f" {', '.join(_ROUNDING_OPTIMIZERS)}, which need pip install 'gpt-oss-qat[torchao]'."
        )
    return found


def _format_problems(config: PipelineConfig) -> list[str]:
    found = []
    rules = _SCALE_RULES[config.format.name]
    if config.format.scale_rule not in rules:
        found.append(
            f"format.scale_rule={config.format.scale_rule.name}: {config.format.name.name} has"
            f" {', '.join(rule.name for rule in rules)}."
        )
    if config.format.importance and config.format.scale_rule is not ScaleRule.mse:
        found.append(
            f"format.importance=true: has a meaning only with format.scale_rule=mse, not"
            f" {config.format.scale_rule.name}."
        )
    held = _HELD_BY[config.export.target]
    if config.stage in (Stage.export, Stage.all) and config.format.name not in held:
        found.append(
            f"export.target={config.export.target.name}: holds {', '.join(name.name for name in held)}, not"
            f" format={config.format.name.name}. Train for another format, or run the stages up to qat and evaluate one"
            " by one."
        )
    return found


def _qat_problems(config: PipelineConfig) -> list[str]:
    found, sft, qat = [], config.sft, config.qat
    follows_sft = config.quantize.source is QuantizeSource.sft
    if qat.distillation.weight and not follows_sft:
        found.append(
            f"qat.distillation.weight={qat.distillation.weight}: the teacher is the SFT model, and with"
            f" quantize.source={config.quantize.source.name} there is none. Set it to 0, or quantize.source=sft."
        )
    if qat.distillation.weight and qat.router_aux_loss_coef:
        found.append(
            f"qat.router_aux_loss_coef={qat.router_aux_loss_coef}: not with qat.distillation.weight="
            f"{qat.distillation.weight}, whose loss has no such part. Set it to 0."
        )
    if follows_sft and sft.method is Method.lora and qat.method is Method.lora and sft.lora != qat.lora:
        found.append(
            f"qat.lora={_shown(qat.lora)} differs from sft.lora={_shown(sft.lora)}: QAT goes on with SFT's adapters."
            " Give both the same values."
        )
    return found


def _experts_problems(config: PipelineConfig) -> list[str]:
    asked, can = config.qat.experts_implementation, _EXPERTS_IMPLEMENTATIONS[config.format.name]
    if asked in can:
        return []
    return [
        f"qat.experts_implementation={asked.name}: leaves out the quantizers of down_proj's inputs, which"
        f" format={config.format.name.name} has. Use one of {', '.join(each.name for each in can)}."
    ]


def _keeping_problems(section: str, train: TrainConfig) -> list[str]:
    found = []
    if train.keep_best and train.save_steps != train.eval_steps:
        found.append(
            f"{section}.save_steps={train.save_steps}, {section}.eval_steps={train.eval_steps}: must be equal with"
            f" {section}.keep_best=true, which needs a checkpoint of every step that is evaluated."
            f" Give both the same value, or {section}.keep_best=false."
        )
    if train.early_stopping_patience is not None and not train.keep_best:
        found.append(
            f"{section}.early_stopping_patience={train.early_stopping_patience}: needs {section}.keep_best=true, or the"
            " weights left would be the last, which did not improve."
        )
    return found


def _data_problems(data: DataConfig) -> list[str]:
    found = _columns_problems("data", data.columns)
    texts = {"data.model_identity": data.model_identity, "data.reasoning_language": data.reasoning_language}
    texts |= {f"data.blend[{i}].reasoning_language": part.reasoning_language for i, part in enumerate(data.blend)}
    for key, text in texts.items():
        if text is not None and ("<|" in text or "\n" in text or not text.strip()):
            found.append(f"{key}={text!r}: must be one line of text, without special tokens.")
    if data.blend and data.path is not None:
        found.append(f"data.path={data.path!r}: not together with data.blend; make it one of the parts, or null.")
    for i, part in enumerate(data.blend):
        if not 0 < part.weight < math.inf:
            found.append(f"data.blend[{i}].weight={part.weight!r}: must be {_POSITIVE.meaning}.")
        if part.columns is not None:
            found += _columns_problems(f"data.blend[{i}]", part.columns)
    return found


def _columns_problems(key: str, columns: ColumnsConfig) -> list[str]:
    pair = (columns.prompt, columns.completion)
    if (columns.messages is None) == (None in pair) or (columns.messages is not None and pair != (None, None)):
        return [
            f"{key}.columns: messages={columns.messages!r}, prompt={columns.prompt!r} and"
            f" completion={columns.completion!r} cannot go together. Name either messages,"
            " or prompt and completion with messages=null."
        ]
    if columns.reasoning is not None and columns.completion is None:
        return [f"{key}.columns.reasoning={columns.reasoning!r}: belongs to completion, which is null."]
    return []


def _not_set(key: str) -> str:
    choices = f" Choose one of: {', '.join(Stage.__members__)}." if key == "stage" else ""
    return f"{key}: is not set. Give {key}=<value>.{choices}"


def _shown(lora: LoraConfig) -> str:
    targets = [target.name for target in lora.targets]
    return (
        f"{{rank: {lora.rank}, alpha: {lora.alpha}, targets: {targets}, layers: {lora.layers},"
        f" every_nth: {lora.every_nth}}}"
    )


@dataclass(frozen=True)
class _Rule:
    meaning: str
    holds: Callable[[Any], bool]


_POSITIVE = _Rule("greater than 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = _Rule("0 or more", lambda value: 0 <= value < math.inf)
_FRACTION = _Rule("between 0 and 1, both excluded", lambda value: 0 < value < 1)
_SHARE = _Rule("0 or more and below 1", lambda value: 0 <= value < 1)
_UP_TO_ONE = _Rule("from 0 to 1", lambda value: 0 <= value <= 1)
_SEED = _Rule("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)
_AT_LEAST_TWO = _Rule("2 or more: the one before is needed while one is written", lambda value: value >= 2)
_PART = _Rule("above 0 and up to 1", lambda value: 0 < value <= 1)
_STEPS = _Rule("a number of steps, or -1", lambda value: value == -1 or value > 0)
_TWO_LANGUAGES = _Rule("at least two different languages", lambda value: len(set(value)) >= 2)
_PORT = _Rule("a port: a whole number from 1 to 65535", lambda value: 0 < value < 2**16)
_NOT_EMPTY = _Rule("some text", lambda value: bool(value.strip()))
_BLOCKS = _Rule("a positive multiple of 32, the block size of MXFP4", lambda value: value > 0 and value % 32 == 0)

_TRAIN_RULES = {
    "learning_rate": _POSITIVE,
    "warmup_ratio": _SHARE,
    "epochs": _POSITIVE,
    "max_steps": _STEPS,
    "batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _POSITIVE,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "seed": _SEED,
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "save_total_limit": _AT_LEAST_TWO,
    "early_stopping_patience": _POSITIVE,
    "lora.rank": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "lora.every_nth": _POSITIVE,
}
_RULES = {
    "model.tiny.hidden_size": _BLOCKS,
    "model.tiny.intermediate_size": _BLOCKS,
    "model.tiny.seed": _SEED,
    "data.seed": _SEED,
    "data.max_samples": _POSITIVE,
    "data.validation_fraction": _FRACTION,
    "data.max_length": _POSITIVE,
    "doctor.row": _POSITIVE,
    "doctor.languages": _TWO_LANGUAGES,
    "upcast.shard_bytes": _POSITIVE,
    "quantize.calibration_samples": _POSITIVE,
    "quantize.batch_size": _POSITIVE,
    "export.shard_bytes": _POSITIVE,
    "verify.samples": _POSITIVE,
    "verify.logits_tolerance": _NOT_NEGATIVE,
    "verify.engine_seconds": _POSITIVE,
    "evaluate.max_samples": _POSITIVE,
    "evaluate.batch_size": _POSITIVE,
    "evaluate.prompts.max_samples": _POSITIVE,
    "evaluate.generation.max_new_tokens": _POSITIVE,
    "evaluate.generation.temperature": _NOT_NEGATIVE,
    "evaluate.generation.top_p": _PART,
    "evaluate.generation.samples": _POSITIVE,
    "evaluate.generation.seed": _SEED,
    "evaluate.generation.batch_size": _POSITIVE,
    "evaluate.endpoint.concurrency": _POSITIVE,
    "evaluate.endpoint.retries": _NOT_NEGATIVE,
    "evaluate.endpoint.timeout_seconds": _POSITIVE,
    "evaluate.judge.concurrency": _POSITIVE,
    "evaluate.judge.retries": _NOT_NEGATIVE,
    "evaluate.judge.timeout_seconds": _POSITIVE,
    "evaluate.judge.max_new_tokens": _POSITIVE,
    "evaluate.judge.attempts": _POSITIVE,
    "evaluate.judge.max_without_verdict": _UP_TO_ONE,
    "evaluate.lm_eval.num_fewshot": _NOT_NEGATIVE,
    "evaluate.lm_eval.limit": _POSITIVE,
    "evaluate.lm_eval.batch_size": _POSITIVE,
    "evaluate.during_training.prompts": _NOT_NEGATIVE,
    "evaluate.during_training.max_new_tokens": _POSITIVE,
    "compare.examples": _NOT_NEGATIVE,
    "serve.program": _NOT_EMPTY,
    "serve.host": _NOT_EMPTY,
    "serve.port": _PORT,
    "serve.tensor_parallel_size": _POSITIVE,
    "serve.context_length": _POSITIVE,
    "serve.gpu_memory_fraction": _FRACTION,
    "serve.question": _NOT_EMPTY,
    "serve.max_new_tokens": _POSITIVE,
    "serve.startup_seconds": _POSITIVE,
    "serve.answer_seconds": _POSITIVE,
    "qat.rounded_cache_gib": _NOT_NEGATIVE,
    "qat.distillation.weight": _UP_TO_ONE,
    "qat.distillation.temperature": _POSITIVE,
    **{f"{section}.{key}": rule for section in ("sft", "qat") for key, rule in _TRAIN_RULES.items()},
}
_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_ROUNDING_OPTIMIZERS = ("adamw_torch_8bit", "adamw_torch_4bit")
_SCALE_RULES = {
    FormatName.mxfp4: (ScaleRule.ceil, ScaleRule.floor, ScaleRule.mse),
    FormatName.nvfp4: (ScaleRule.nearest, ScaleRule.ceil, ScaleRule.floor, ScaleRule.mse),
    FormatName.nvfp4_w4a4: (ScaleRule.nearest, ScaleRule.ceil, ScaleRule.floor, ScaleRule.mse),
}
_EXPERTS_IMPLEMENTATIONS = {
    FormatName.mxfp4: tuple(ExpertsImplementation),
    FormatName.nvfp4: tuple(ExpertsImplementation),
    FormatName.nvfp4_w4a4: (ExpertsImplementation.auto, ExpertsImplementation.eager, ExpertsImplementation.batched_mm),
}
_HELD_BY = {
    ExportTarget.mxfp4: (FormatName.mxfp4,),
    ExportTarget.openai: (FormatName.mxfp4,),
    ExportTarget.nvfp4: (FormatName.nvfp4, FormatName.nvfp4_w4a4, FormatName.mxfp4),
    ExportTarget.gguf: (FormatName.mxfp4,),
    ExportTarget.bf16: (FormatName.mxfp4, FormatName.nvfp4),
}


def _select(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _leaf_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            keys += _leaf_keys(child, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
