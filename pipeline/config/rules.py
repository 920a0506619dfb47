"""Check a composed configuration: keys, types, bounds, and the rules between settings.

`resolve` converts the configuration that Hydra composed to a `PipelineConfig`. `problems` lists the broken bounds and
rules.
"""

from collections.abc import Iterator
from dataclasses import is_dataclass

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import evaluation_rules, secrets, tracking
from pipeline.config.bounds import bounds_of
from pipeline.config.data import ColumnsConfig, DataConfig
from pipeline.config.format import FormatName
from pipeline.config.keys import is_known, schema, unknown_key
from pipeline.config.pipeline import PipelineConfig, Sharding, Stage, list_controls, list_names
from pipeline.config.quantize import QuantizeSource, RoundingMethod, first_training, source_problem, writes_rounded
from pipeline.config.targets import TARGETS, advise_target
from pipeline.config.training import (
    ROUNDING_OPTIMIZERS,
    ExpertsImplementation,
    Method,
    Oscillation,
    Precision,
    TrainConfig,
    show_lora,
)
from pipeline.config.upcast import Experts
from pipeline.errors import UserError, user_errors
from pipeline.numerics.formats import FORMATS, SCALE_RULES, ScaleType


def resolve(composed: DictConfig) -> PipelineConfig:
    """Check the composed configuration, and convert it to plain dataclasses.

    Raises:
        UserError: there are unknown keys, missing values, a value of the wrong type, or broken rules. The error lists
            all problems of one kind, but only the first wrong type.
    """
    secrets.remember(composed)
    # `+sft.lr=1` adds an unknown key to the composed configuration. OmegaConf.to_object would drop the key silently.
    unknown = [key for key in _leaf_keys(composed) if not is_known(key)]
    if unknown:
        raise user_errors([unknown_key(key, "configuration") for key in unknown])
    typed = composed if OmegaConf.get_type(composed) is PipelineConfig else _typed(composed)
    try:
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise _unreadable(typed, error) from error
    assert isinstance(config, PipelineConfig)
    found = problems(config)
    if found:
        raise user_errors(found)
    return config


def _typed(composed: DictConfig) -> DictConfig:
    """Return the configuration with the types of the schema. Hydra composes it with these types."""
    typed = schema()
    try:
        typed.merge_with(composed)
    except OmegaConfBaseException as error:
        raise _wrong_value(error) from error
    return typed


def _unreadable(typed: DictConfig, error: OmegaConfBaseException) -> UserError:
    """Return the error for a configuration that cannot be converted. If values are missing, it lists only these."""
    try:
        missing = sorted(OmegaConf.missing_keys(typed))
    except OmegaConfBaseException as first:
        return _wrong_value(first)
    return user_errors([_missing_problem(key) for key in missing]) if missing else _wrong_value(error)


def _wrong_value(error: OmegaConfBaseException) -> UserError:
    key = f"{error.full_key}: " if error.full_key else ""
    return UserError(f"configuration: {key}{str(error).splitlines()[0]}")


def problems(config: PipelineConfig) -> list[str]:
    """Return a message for each bound and rule that the settings break, with full keys and values."""
    found = [*_bound_problems(config), *_data_problems(config.data), *evaluation_rules.problems(config.evaluate)]
    found += _train_problems("sft", config.sft) + _train_problems("qat", config.qat)
    found += _format_problems(config) + _resharding_problems(config) + _parts_problems(config)
    found += quantize_problems(config) + _oscillation_problems(config) + [*tracking.problems(config.tracking)]
    found += _overwrite_problems(config) + _source_problems(config)
    return found + _qat_problems(config) + _experts_problems(config) + _packed_problems(config)


def _bound_problems(section: object, prefix: str = "") -> Iterator[str]:
    """Yield a message for each broken bound. Sections inside this section, or inside its lists, are also checked."""
    kind: type = type(section)
    bounds = bounds_of(kind)
    for name, value in vars(section).items():
        key = f"{prefix}{name}"
        if is_dataclass(value):
            yield from _bound_problems(value, f"{key}.")
        elif isinstance(value, list):
            for i, element in enumerate(value):
                if is_dataclass(element):
                    yield from _bound_problems(element, f"{key}[{i}].")
        if isinstance(value, str) and not value.strip():
            yield f"{key}: is empty, as if a shell variable were not set. Give it a value, or leave it out."
        elif value is not None:
            yield from (f"{key}={value!r}: must be {b.meaning}." for b in bounds[name] if not b.holds(value))


def _overwrite_problems(config: PipelineConfig) -> list[str]:
    names = list_names(config.overwrite)
    if config.stage is Stage.all or not names or config.stage.name in names:
        return []
    if config.stage is Stage.controls and list_controls(config.overwrite) == names:
        return []
    return [
        f"overwrite={config.overwrite}: stage={config.stage.name} does not build {' or '.join(names)}. Use"
        f" overwrite=true to rebuild {config.stage.name}, or stage=all to run several stages."
    ]


def _source_problems(config: PipelineConfig) -> list[str]:
    source = config.quantize.source
    if config.stage is Stage.sft and config.quantize.adapters is not None:
        return [f"quantize.source={source}: these adapters are the run's SFT. To run stage=sft, set it to sft."]
    return [problem] if (problem := source_problem(source)) is not None else []


def _data_problems(data: DataConfig) -> list[str]:
    found = _columns_problems("data", data.columns)
    texts = {"data.model_identity": data.model_identity, "data.reasoning_language": data.reasoning_language}
    texts |= {f"data.blend[{i}].reasoning_language": part.reasoning_language for i, part in enumerate(data.blend)}
    texts |= {"data.validation.reasoning_language": data.validation.reasoning_language}
    for key, text in texts.items():
        if text is not None and ("<|" in text or "\n" in text):
            found.append(f"{key}={text!r}: must be one line of text, without special tokens.")
    if data.blend and data.path is not None:
        found.append(
            f"data.path={data.path!r}: cannot be combined with data.blend. Make the path a part of the"
            " blend, or set it to null."
        )
    parts = {f"data.blend[{i}]": part for i, part in enumerate(data.blend)} | {"data.validation": data.validation}
    for key, part in parts.items():
        if part.columns is not None:
            found += _columns_problems(key, part.columns)
    return found + _validation_problems(data)


def _validation_problems(data: DataConfig) -> list[str]:
    own = data.validation
    if not own.is_set:
        alone = [name for name, value in vars(own).items() if value is not None]
        return [f"data.validation.{name}: needs data.validation.path or data.validation.split." for name in alone]
    if own.path is None and data.path is None:
        return [
            f"data.validation.split={own.split}: needs data.path, which is not set. Set data.validation.path to the"
            " data set with the validation rows."
        ]
    is_same = own.path in (None, data.path) and own.split in (None, data.split)
    if is_same and own.filter is None and own.revision in (None, data.revision):
        return [
            f"data.validation.path={own.path or 'null'}, data.validation.split={own.split or 'null'}: these are the"
            f" training rows (data.path={data.path}, data.split={data.split or 'null'}). Name another file or split, or"
            " set both to null to hold out a share of the rows."
        ]
    return []


def _columns_problems(key: str, columns: ColumnsConfig) -> list[str]:
    pair = (columns.prompt, columns.completion)
    if (columns.messages is None) == (None in pair) or (columns.messages is not None and pair != (None, None)):
        return [
            f"{key}.columns: messages={columns.messages!r}, prompt={columns.prompt!r} and"
            f" completion={columns.completion!r} cannot go together. Name either messages"
            " alone, or prompt and completion with messages=null."
        ]
    needed = (("reasoning", columns.reasoning, "completion"), ("input", columns.input, "prompt"))
    return [
        f"{key}.columns.{name}={column!r}: needs {key}.columns.{other}, which is null."
        for name, column, other in needed
        if column is not None and getattr(columns, other) is None
    ]


def _train_problems(section: str, train: TrainConfig) -> list[str]:
    found = []
    if train.method is Method.lora and train.precision is Precision.mixed_bf16:
        found.append(
            f"{section}.precision=mixed_bf16: not with LoRA. Autocast would round the merged weights differently from"
            " the export. Use bf16 (the adapters stay FP32) or fp32."
        )
    if train.stochastic_rounding:
        found += _rounding_problems(section, train)
    if train.method is Method.lora and not train.lora.targets:
        found.append(f"{section}.lora.targets=[]: LoRA needs at least one of attention, experts.")
    if train.lora.layers is not None and train.lora.every_nth is not None:
        found.append(
            f"{section}.lora.layers={train.lora.layers}, {section}.lora.every_nth={train.lora.every_nth}: set only one"
            " of them. The other must be null."
        )
    return found + _keeping_problems(section, train)


def _rounding_problems(section: str, train: TrainConfig) -> list[str]:
    found = []
    if train.method is Method.lora or train.precision is not Precision.bf16:
        found.append(
            f"{section}.stochastic_rounding=true: applies only to training of BF16 weights. No BF16 weights are trained"
            f" if {section}.method={train.method.name} and {section}.precision={train.precision.name}. Set it to false."
        )
    if train.optimizer not in ROUNDING_OPTIMIZERS:
        found.append(
            f"{section}.stochastic_rounding=true: {section}.optimizer={train.optimizer} does not support it. Use one of"
            f" {', '.join(ROUNDING_OPTIMIZERS)}, which need pip install 'gpt-oss-qat[torchao]'."
        )
    return found


def _keeping_problems(section: str, train: TrainConfig) -> list[str]:
    found = []
    if train.keep_best and train.save_steps != train.eval_steps:
        found.append(
            f"{section}.save_steps={train.save_steps}, {section}.eval_steps={train.eval_steps}: must be equal,"
            f" because {section}.keep_best=true needs a checkpoint at each validation."
            f" Give both the same value, or set {section}.keep_best=false."
        )
    if train.early_stopping_patience is not None and not train.keep_best:
        found.append(
            f"{section}.early_stopping_patience={train.early_stopping_patience}: needs {section}.keep_best=true."
            " Otherwise the last weights would be kept, although they did not improve the validation loss."
        )
    return found


def _resharding_problems(config: PipelineConfig) -> list[str]:
    if config.sharding is Sharding.fsdp2:
        return []
    return [
        f"{section}.reshard_after_forward=false: applies only to sharding=fsdp2, not {config.sharding.name}."
        " Set it to true."
        for section, train in (("sft", config.sft), ("qat", config.qat))
        if not train.reshard_after_forward
    ]


def _format_problems(config: PipelineConfig) -> list[str]:
    found = []
    name, scale_rule = config.format.name.name, config.format.scale_rule.name
    rules = SCALE_RULES[FORMATS[name].scale_type]
    if scale_rule not in rules:
        found.append(f"format.scale_rule={scale_rule}: {name} has {', '.join(rules)}.")
    if config.format.importance and scale_rule != "mse":
        found.append(f"format.importance=true: applies only to format.scale_rule=mse, not {scale_rule}.")
    target = config.export.layout.name
    held = TARGETS[target].holds
    if config.stage in (Stage.export, Stage.all) and name not in held:
        found.append(
            f"export.target={target}: cannot hold format={name}, only {', '.join(held)}."
            f" {advise_target(name)}, or train for another format."
        )
    return found


def quantize_problems(config: PipelineConfig) -> list[str]:
    """Return a message for each rule that `quantize.method` and `quantize.scales` break.

    The forward pass and the export round the rounded weights again. This must not change them.
    """
    name, rule = config.format.name.name, config.format.scale_rule.name
    if config.quantize.method is RoundingMethod.gptq and FORMATS[name].quantizes_activations:
        return [
            f"quantize.method=gptq: calibrates on unrounded inputs, but format={name} rounds the experts' inputs too."
            " Use quantize.method=stochastic, or a format that rounds only weights."
        ]
    if not writes_rounded(config.quantize) or FORMATS[name].scale_type is not ScaleType.e4m3:
        return []
    scales = config.quantize.scales
    asked = f"quantize.method={config.quantize.method.name}" + (f" quantize.scales={scales.name}" if scales else "")
    found = []
    if rule != "mse":
        found.append(
            f"{asked}: writes rounded experts. With format={name}, only format.scale_rule=mse keeps their values, not"
            f" {rule}. Set format.scale_rule=mse."
        )
    if config.format.importance:
        found.append(
            f"{asked}: writes rounded experts. With format={name}, format.importance=true could change their values."
            " Set format.importance=false."
        )
    return found


def _qat_problems(config: PipelineConfig) -> list[str]:
    found, sft, qat, source = [], config.sft, config.qat, config.quantize.source
    if qat.distillation.weight and source == QuantizeSource.upcast:
        found.append(
            f"qat.distillation.weight={qat.distillation.weight}: the teacher is the SFT model. There is no SFT model if"
            f" quantize.source={source}. Set it to 0, or set quantize.source=sft."
        )
    if qat.distillation.weight and qat.router_aux_loss_coef:
        found.append(
            f"qat.router_aux_loss_coef={qat.router_aux_loss_coef}: cannot be combined with qat.distillation.weight="
            f"{qat.distillation.weight}, because the distillation loss has no router term. Set it to 0."
        )
    continues = source == QuantizeSource.sft and not writes_rounded(config.quantize)
    if continues and sft.method is Method.lora and qat.method is Method.lora and sft.lora != qat.lora:
        found.append(
            f"qat.lora={show_lora(qat.lora)} differs from sft.lora={show_lora(sft.lora)}: QAT continues with SFT's"
            " adapters. Give both the same values."
        )
    return found


def _oscillation_problems(config: PipelineConfig) -> list[str]:
    if config.qat.oscillation is Oscillation.none:
        return []
    sharding, method = config.sharding, config.qat.method
    asked, remedy = f"qat.oscillation={config.qat.oscillation.name}", "or set qat.oscillation=none."
    found = []
    if method is not Method.full:
        found.append(
            f"{asked}: holds weights of the experts, but qat.method={method.name} does not train them. Use"
            f" train@qat=full, {remedy}"
        )
    if sharding in (Sharding.zero2, Sharding.zero3):
        found.append(
            f"{asked}: cannot hold weights with sharding={sharding.name}, because DeepSpeed overwrites held weights"
            f" with its own copies. Use sharding=fsdp2, {remedy}"
        )
    if config.format.importance:
        found.append(
            f"{asked}: rounds without format.importance, so it would not see the values of training. Set"
            f" format.importance=false, {remedy}"
        )
    return found


def _experts_problems(config: PipelineConfig) -> list[str]:
    asked, name = config.qat.experts_implementation, config.format.name.name
    if asked.quantizes_activations or not FORMATS[name].quantizes_activations:
        return []
    can = [each.name for each in ExpertsImplementation if each.quantizes_activations]
    return [
        f"qat.experts_implementation={asked.name}: skips the input quantizers of down_proj. format={name} needs them."
        f" Use one of {', '.join(can)}."
    ]


def _packed_problems(config: PipelineConfig) -> list[str]:
    """Packed experts are frozen. Adapters beside them can be trained, and the BF16 parts of the model."""
    first, train = first_training(config.quantize.source, config.sft, config.qat)
    if config.sft.start is not None and first == Stage.sft.name:
        return []  # training continues from another model, which `sft` checks
    if config.upcast.experts is Experts.packed and train.method is Method.full:
        others = "lora or bf16_parts" if first == Stage.sft.name else "lora"
        return [
            f"upcast.experts=packed: {first}.method=full trains the experts' weights, which is impossible while they"
            f" are packed. Set upcast.experts=bf16, or {first}.method={others}."
        ]
    if config.upcast.experts is Experts.bf16 and train.method is Method.bf16_parts:
        return [
            f"upcast.experts=bf16: {first}.method=bf16_parts does not train the experts' weights. It keeps them packed,"
            f" so that their bytes reach the export unchanged. Set upcast.experts=null, or {first}.method=full."
        ]
    return []


def _parts_problems(config: PipelineConfig) -> list[str]:
    """QAT of the BF16 parts needs experts that were trained and rounded before."""
    source, is_mxfp4 = config.quantize.source, config.format.name is FormatName["mxfp4"]
    if source != QuantizeSource.upcast or config.qat.method is not Method.bf16_parts or not is_mxfp4:
        return []
    return [
        "qat.method=bf16_parts with quantize.source=upcast: the experts are MXFP4 already, so there is nothing to"
        " round. Use train@sft=bf16_parts with quantize.source=sft."
    ]


def _missing_problem(key: str) -> str:
    choices = f" Choose one of: {', '.join(Stage.__members__)}." if key == "stage" else ""
    return f"{key}: is not set. Give {key}=<value>.{choices}"


def _leaf_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, node):
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and len(child):
            keys += _leaf_keys(child, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
