"""Choose the controls of a run: models that QAT must beat, because they also have more training or better rounding.

A control is a run of its own in `<run_dir>/controls/<name>`. It shares the earlier stages of the main run.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from pipeline.config import rules
from pipeline.config.pipeline import (
    BF16_PARTS,
    MORE_SFT,
    PipelineConfig,
    Stage,
    list_controls,
    list_names,
    rebuilds,
)
from pipeline.config.quantize import QuantizeSource, RoundingMethod, leaves_nothing_to_round
from pipeline.config.rates import convert
from pipeline.config.training import Method, Precision, SftConfig, TrainConfig

DIRECTORY = Stage.controls.name
"""Subdirectory of run_dir. It holds one run directory for each control."""

CONTROL_FILE = "control.json"
"""File in a control's directory. It names the stage that makes the control's model."""

_BEST_FIRST = (RoundingMethod.auto, RoundingMethod.gptq, RoundingMethod.stochastic, RoundingMethod.nearest)
_OF_METHOD = ("method", "lora", "precision", "optimizer", "stochastic_rounding")
"""Settings of `sft` that belong to its method."""


@dataclass(frozen=True)
class Control:
    """A control: a run whose configuration differs from the main run's in a few settings.

    Attributes:
        name: name of the control, and of its directory.
        config: configuration of its run. `overwrite`, `device` and similar settings are the main run's.
        stages: the stages that it runs. The last one makes its model. The stages before them are the main run's.
        origin: where its settings come from, for error messages.
    """

    name: str
    config: PipelineConfig
    stages: tuple[Stage, ...]
    origin: str

    @property
    def model(self) -> str:
        """Name of the control's model in the results: its directory, relative to the main run's directory."""
        return f"{DIRECTORY}/{self.name}/{self.stages[-1].name}"


def is_control(model: str) -> bool:
    """Return whether a model of this name in the results is a control."""
    return model.startswith(f"{DIRECTORY}/")


def rebuilds_stage(overwrite: bool | str, control: str, stage: Stage) -> bool:
    """Return whether `overwrite` asks to rebuild a stage of a control.

    `controls` and the control's name ask for all its stages. `<control>/<stage>` asks for this stage, and for the
    control's stages after it, which are made from it.
    """
    if rebuilds(overwrite, Stage.controls) or control in list_names(overwrite):
        return True
    order = list(Stage)
    before = order[: order.index(stage) + 1]
    return any(f"{control}/{each.name}" in list_names(overwrite) for each in before)


def overwrite_problem(overwrite: bool | str, controls: Iterable[Control]) -> str | None:
    """Return a message if `overwrite` lists a control, or a stage of one, that is not among `controls`. Else None."""
    known = [(each.name, *(f"{each.name}/{stage.name}" for stage in each.stages)) for each in controls]
    missing = [name for name in list_controls(overwrite) if not any(name in names for names in known)]
    if not missing:
        return None
    return (
        f"overwrite={overwrite}: this run makes no control {' or '.join(missing)}. It makes"
        f" {', '.join(name for names in known for name in names)}."
    )


def reason_for_none(config: PipelineConfig) -> str | None:
    """Return the reason why a run has no controls, or None."""
    if config.quantize.source == QuantizeSource.upcast:
        return "quantize.source=upcast: without SFT, there is nothing to compare QAT with"
    if leaves_nothing_to_round(config.quantize.source, config.sft, config.format.name):
        return "sft.method=bf16_parts leaves nothing to round, so there is no QAT"
    return None


def reason_without_parts(config: PipelineConfig, *, has_mxfp4: bool) -> str | None:
    """Return the reason why a run has no control `bf16_parts`, or None. `has_mxfp4` is as for `controls_of`."""
    if config.quantize.adapters is not None:
        return "quantize.source names adapters, and the settings and data that made them are unknown"
    if config.sft.method is Method.bf16_parts:
        return "sft.method=bf16_parts trains the same"
    if config.sft.start is not None:
        return "sft.start is set, and the experts of that model may have been trained"
    if not has_mxfp4:
        return "the source's experts are not packed MXFP4 weights"
    return None


def controls_of(config: PipelineConfig, sft: str, *, has_mxfp4: bool) -> list[Control]:
    """List the controls of a run, the fastest first. Roundings that the format does not allow are left out.

    Args:
        config: configuration of the main run.
        sft: directory of the main run's `sft`.
        has_mxfp4: whether the experts of the source are MXFP4, or `upcast` packs them.
    """
    if reason_for_none(config) is not None:
        return []
    methods = [method for method in RoundingMethod if _is_possible(_rounded(config, method))]
    found = [*_roundings(config, methods)]
    if config.quantize.adapters is None:  # more SFT needs the settings of SFT
        found.append(_more_sft(config, methods, sft))
    return [*found, _parts(config)] if reason_without_parts(config, has_mxfp4=has_mxfp4) is None else found


def _roundings(config: PipelineConfig, methods: list[RoundingMethod]) -> Iterator[Control]:
    """Yield PTQ of the SFT model by each method, except the main run's own."""
    for method in methods:
        if method not in (RoundingMethod.auto, config.quantize.method):
            its = _in_own_directory(_rounded(config, method), method.name)
            yield Control(method.name, its, (Stage.quantize,), "quantize.method is the name of the control")


def _more_sft(config: PipelineConfig, methods: list[RoundingMethod], sft: str) -> Control:
    """Train the SFT model for as many more steps as QAT, without quantizers. Then round it by the best method."""
    best = next(method for method in _BEST_FIRST if method in methods)
    its = _in_own_directory(_rounded(config, best), MORE_SFT)
    its = replace(its, sft=_continued(config, sft))
    return Control(MORE_SFT, its, (Stage.sft, Stage.quantize), "its sft.* are the main run's qat.*")


def _continued(config: PipelineConfig, start: str) -> SftConfig:
    """Return the settings of QAT, as settings of `sft`.

    QAT of the BF16 parts trains them beside rounded experts. Before rounding, this would leave the experts out, so
    the control then trains by SFT's method.
    """
    qat, sft = config.qat, config.sft
    more = SftConfig(**{each.name: getattr(qat, each.name) for each in fields(TrainConfig)}, start=start)
    if Method.lora is sft.method is qat.method:
        more = replace(more, lora=sft.lora)  # training continues with SFT's adapters
    if qat.method is not Method.bf16_parts or sft.method is Method.bf16_parts:
        return more
    more = replace(more, **{name: getattr(sft, name) for name in _OF_METHOD})
    return replace(more, learning_rate=convert(qat.learning_rate, qat.method, sft.method))


def _parts(config: PipelineConfig) -> Control:
    """Train only the BF16 parts, with the steps and data of SFT. Adapters' rate and precision do not suit them."""
    sft = replace(config.sft, method=Method.bf16_parts)
    if config.sft.method is Method.lora:
        precision = Precision.mixed_bf16 if sft.precision is Precision.bf16 else sft.precision
        rate = convert(sft.learning_rate, config.sft.method, sft.method)
        sft = replace(sft, learning_rate=rate, precision=precision)
    its = replace(config, sft=sft, upcast=replace(config.upcast, experts=None))
    is_rounded = not leaves_nothing_to_round(its.quantize.source, its.sft, its.format.name)
    stages = (Stage.upcast, Stage.sft, *([Stage.quantize] if is_rounded else []))
    origin = "its sft.* are the main run's, with sft.method=bf16_parts"
    return Control(BF16_PARTS, _in_own_directory(its, BF16_PARTS), stages, origin)


def _rounded(config: PipelineConfig, method: RoundingMethod) -> PipelineConfig:
    return replace(config, quantize=replace(config.quantize, method=method))


def _is_possible(config: PipelineConfig) -> bool:
    """Return whether the format allows the rounding. Controls have no QAT, so its rules do not count."""
    return not rules.quantize_problems(config)


def _in_own_directory(config: PipelineConfig, name: str) -> PipelineConfig:
    """The main run's stages are linked into the directory, so the control needs no base_run."""
    tracking = replace(config.tracking, name=f"{config.tracking.name or config.recipe}-{name}")
    own = f"{config.run_dir}/{DIRECTORY}/{name}"
    return replace(config, run_dir=own, base_run=None, controls=False, tracking=tracking)
