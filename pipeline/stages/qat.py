"""qat: trains the quantized model at a low learning rate. The forward pass rounds the experts as the export does."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.config import Method, PipelineConfig, QatConfig, Stage, raise_if_nothing_to_round, rates
from pipeline.data.examples import prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.models import foreign_sft, loading, placement, references, saving, sharding
from pipeline.models.references import ModelRef
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say, warn
from pipeline.runs.processes import is_main_process
from pipeline.runs.records import TrainingRecord
from pipeline.runs.run import Run
from pipeline.training import resume

if TYPE_CHECKING:
    from pipeline.training.distillation import Teacher

_SETTINGS = ("data", "format", "qat")
_LOWEST_SHARE = 0.1
"""Lowest usual share of SFT's rate. In docs/rounding.md, QAT below it regained at most 11 % of the loss."""
_TOLERANCE = 1e-6  # hides the error of products such as 0.1 * 2e-5
_USUAL_RATE = "Leave qat.learning_rate unset to get the usual rate, a third of SFT's."


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/qat: the trained model with its quantizers."""
    here = Run(config)
    raise_if_nothing_to_round(config.quantize.source, config.sft, config.format.name)
    start = here.require(Stage.quantize)
    sharding.raise_if_impossible(config.sharding)
    foreign_sft.raise_if_changed(here, start)
    _raise_if_quantized_otherwise(here, references.of_artifact(start), references.configured_format(config.format))
    _warn_about_sft(config, here, start)
    rows = load_rows(here, config.data)
    return build(
        here,
        Stage.qat,
        settings=_SETTINGS,
        parents={"quantize": start.fingerprint},
        work=lambda directory: _train(config, here, start, rows, directory),
        data=rows.fingerprint,
        resumable_as=resume.by_global_batch,
        on_every_process=True,
        keeps_metrics=True,
    )


def _raise_if_quantized_otherwise(here: Run, start: ModelRef, wanted: BlockFormat) -> None:
    have = start.block_format
    if have is not None and have != wanted:
        raise UserError(
            f"{start.directory} was made for format={have.name} with format.scale_rule={have.scale_rule}, but the"
            f" configuration sets format={wanted.name} with format.scale_rule={wanted.scale_rule}. Quantize again:"
            f" {here.command(Stage.quantize, 'overwrite=true')}. Or use format={have.name}"
            f" format.scale_rule={have.scale_rule}."
        )


def _warn_about_sft(config: PipelineConfig, here: Run, start: Artifact) -> None:
    if Stage.sft.name not in start.parents:
        warn(
            "qat",
            f"{start.directory} was made with quantize.source=upcast, so nothing has been fine-tuned yet. Published"
            " results have QAT after SFT, never instead of it. QAT preserves a learned task through rounding, but its"
            " learning rate is too low to teach a new task.",
        )
        return
    if (found := _rate_of_sft(config.qat, here)) is None:
        return
    base, reference = found
    rate = f"qat.learning_rate={config.qat.learning_rate}"
    if config.qat.learning_rate > base:
        warn(
            "qat",
            f"{rate} is above {reference}. QAT moves the weights to values of the format, and a high rate would undo"
            f" the fine-tuning. {_USUAL_RATE}",
        )
    if config.qat.learning_rate < base * _LOWEST_SHARE * (1 - _TOLERANCE):
        warn(
            "qat",
            f"{rate} is {config.qat.learning_rate / base:.2g} of {reference}. With such a low rate, QAT regains only a"
            f" small part of the loss from rounding. {_USUAL_RATE}",
        )


def _rate_of_sft(qat: QatConfig, here: Run) -> tuple[float, str] | None:
    """Return SFT's learning rate, converted to the method of QAT, and a phrase. Return None if SFT was removed."""
    if not here.is_complete(Stage.sft):
        return None
    settings = here.require(Stage.sft).settings
    trained, rate = Method[settings["sft.method"]], float(settings["sft.learning_rate"])
    base = rates.convert(rate, trained, qat.method)
    if rates.RELATIVE_RATES[trained] == rates.RELATIVE_RATES[qat.method]:
        return base, f"the learning rate of sft, {rate}"
    return base, f"the learning rate of sft, {base} ({rate} with method={trained.name}, converted to {qat.method.name})"


def _say_rate(qat: QatConfig, here: Run, start: Artifact) -> None:
    if Stage.sft.name in start.parents and (found := _rate_of_sft(qat, here)) is not None:
        base, reference = found
        say("qat", f"learning rate {qat.learning_rate}: {qat.learning_rate / base:.2g} of {reference}")


def _train(config: PipelineConfig, here: Run, quantized: Artifact, rows: Rows, directory: Path) -> Result:
    from pipeline.evaluate import samples
    from pipeline.models import fake_quantizers, quantizer_calls, rounded_weights
    from pipeline.training import attention_check, oscillation, trainer
    from pipeline.training.weight_changes import WeightChanges

    _say_rate(config.qat, here, quantized)
    start = references.of_artifact(quantized)
    attention = attention_check.check(config.qat, "qat")
    block_format = references.configured_format(config.format)
    tokenizer = load_tokenizer(start.base)
    splits = prepare_examples(here, config.data, rows, tokenizer)
    copies = placement.copies_in_host_memory(config.sharding)
    placement.raise_if_host_too_small("qat", start.base, loading.TRAIN_DTYPES[config.qat.precision], copies)
    model = loading.load_to_train(start, config.qat, attention, config.sharding)
    watchers = oscillation.watch(model, config.qat, block_format, config.sharding)
    # Read the weights before frozen experts are rounded in place.
    changes = WeightChanges(model, block_format, [watcher.measure for watcher in watchers])
    budget = rounded_weights.budget_bytes(
        config.qat.rounded_cache_gib, config.sharding, on_gpu=torch.cuda.is_available()
    )
    teacher = _load_teacher(here, config, start, attention)
    is_shared = teacher is not None and teacher.model is None
    rounded = fake_quantizers.keep_rounded(model, budget, keeps_frozen=is_shared)
    looks = samples.callback(here, config.data, config.evaluate, rows=rows, tokenizer=tokenizer, directory=directory)
    inputs = trainer.Inputs(model, tokenizer, splits, changes, rounded, teacher, [*watchers, *looks])
    with quantizer_calls.watch(model) as fired:
        figures = trainer.train(inputs, trainer.Setup(config.qat, "qat", directory, config.sharding))
    fired.raise_unless_all(model)
    figures["quantizers"] = fake_quantizers.count(model, block_format)
    kind, saved, digests = saving.save(model, start, directory, train=config.qat, shared=config.sharding)
    if is_main_process():
        fake_quantizers.save_state(model, directory)
    record = TrainingRecord.from_details({**figures, **saved.details(), "attn_implementation": attention})
    form = MXFP4.name if kind is Kind.packed else saved.dtype
    return Result(kind, record, form, block_format.name, block_format.scale_rule, digests)


def _load_teacher(here: Run, config: PipelineConfig, start: ModelRef, attention: str) -> "Teacher | None":
    """Return the teacher, which predicts like the SFT model. Without distillation, return None.

    If possible, the teacher uses the base of the student. Then there is no second model in memory.

    Args:
        here: the run.
        config: the configuration.
        start: the model that QAT trains.
        attention: attention implementation of QAT.
    """
    from pipeline.models.attention import for_teacher
    from pipeline.training import distillation
    from pipeline.training.distillation import Teacher

    settings = config.qat.distillation
    if not settings.weight:
        return None
    sft = references.stage_ref(here, Stage.sft)
    has_own_base = not start.base.samefile(sft.base)
    if not distillation.holds_second_model(config.qat, sft.dtype, has_own_base=has_own_base):
        return distillation.share_base(start if sft.is_foreign else sft, settings)  # `start` is a copy of foreign ones
    own = for_teacher(attention, config.qat.precision, sft.dtype)
    model = loading.load_teacher(sft, config.qat, config.sharding, own)
    return Teacher(model, settings.weight, settings.temperature)
