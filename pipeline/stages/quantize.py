"""quantize: rounds the fine-tuned model's experts, and inserts fake quantizers. The result is the PTQ baseline for QAT.

By default, only the fake quantizers round: the forward pass rounds to the nearest values, and the weights on disk stay
as they were trained. With `quantize.method` or `quantize.scales`, the stage writes rounded experts. For full training,
it writes a full checkpoint. For LoRA, it merges SFT's adapters, and writes the rounded result as a new base below
`base/`, with new adapters.

The model first takes the form that QAT trains. For full training, SFT's adapters are merged. For LoRA, a full
checkpoint gets new adapters. For training of the BF16 parts, the experts are rounded now, and frozen later. Quantizers
come last: if an adapter were attached to weights that already have a quantizer, this quantizer would never run.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from pipeline.checkpoints.dtypes import dtype_name
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import link_or_copy
from pipeline.config import (
    Fallback,
    Method,
    PipelineConfig,
    QuantizeConfig,
    QuantizeSource,
    RoundingMethod,
    Stage,
    raise_if_nothing_to_round,
    rounds_base,
)
from pipeline.data.examples import Splits, prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.evaluate import measure
from pipeline.models import attention, foreign_sft, loading, losses, placement, references, saving
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.quantize import calibration, gptq, origins, report, rounding, selection
from pipeline.quantize.gptq import GptqSettings
from pipeline.quantize.rounding import Job
from pipeline.quantize.selection import Candidate
from pipeline.runs.artifacts import BOOKKEEPING, CHECKPOINTS_DIR, Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say
from pipeline.runs.records import ModelRecord, QuantizeRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SETTINGS = ("data", "format", "quantize", "qat.method", "qat.lora", "qat.precision", "qat.seed")
BASE_DIR = "base"
"""Directory of the rounded base below the stage's directory, if QAT trains adapters."""


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/quantize: the fine-tuned model with fake quantizers. Check that every quantizer runs."""
    here = Run(config)
    raise_if_nothing_to_round(config.quantize.source, config.sft, config.format.name)
    block_format = references.configured_format(config.format)  # wrong settings end the run before the data is read
    start = _find_start(config, here)
    parents = {start.name: start.fingerprint}
    if _writes_rounded(config) or start.is_foreign:
        upcast = references.require_upcast(here, config.model.path)
        parents[upcast.stage] = upcast.fingerprint
        if _writes_rounded(config):
            origins.find_packed(upcast, config.quantize, block_format)
    rows = load_rows(here, config.data)
    return build(
        here,
        Stage.quantize,
        settings=_SETTINGS,
        parents=parents,
        work=lambda directory: _quantize(config, here, start, rows, directory),
        data=rows.fingerprint,
    )


def _find_start(config: PipelineConfig, here: Run) -> ModelRef:
    """Return the model to quantize: the run's SFT, adapters of another program in its place, or the upcast."""
    if config.quantize.source == QuantizeSource.upcast:
        return references.of_artifact(references.require_upcast(here, config.model.path))
    if config.quantize.adapters is not None:
        foreign_sft.check(here, references.require_upcast(here, config.model.path).directory)
    start = references.stage_ref(here, Stage.sft)
    if start.is_foreign:
        measure.check_tokens([start], None)
    return start


def _quantize(config: PipelineConfig, here: Run, ref: ModelRef, rows: Rows, directory: Path) -> Result:
    from pipeline.models import adapters

    block_format = references.configured_format(config.format)
    rounds = _writes_rounded(config)
    if ref.is_foreign:
        foreign_sft.tell(here, ref)
    splits = prepare_examples(here, config.data, rows, load_tokenizer(ref.base))
    if rounds:
        form = _write_rounded(config, here, ref, splits, directory)
    else:
        form = _take_form(config.qat.method, ref, directory)
    kind, start, saved = form.kind, form.ref, form.record
    placement.raise_if_host_too_small("quantize", start.base, start.dtype)
    chosen = attention.for_inference(start.dtype)
    model = placement.place(loading.load_quantized(start, start.dtype, attn_implementation=chosen))
    if config.qat.method is Method.lora and not start.adapter:
        model = adapters.attach(model, config.qat, "qat")
        kind, saved, _ = saving.save(model, start, directory, train=config.qat, shared=config.sharding)
    quantizers = _insert_quantizers(config, model, _calibration_batches(config, splits.train, ref), directory)
    if not rounds:
        form = replace(form, account=_measure(config, here, _written(directory, kind, saved), directory))
    record = QuantizeRecord(
        **vars(saved),
        quantizers=quantizers,
        method=form.method,
        scales=form.scales or block_format.scale_rule,
        account=form.account,
        fallback=form.fallback,
        candidates=form.candidates,
        adapters=str(ref.directory) if ref.is_foreign else None,
        writes_rounded=rounds if ref.is_foreign else None,
    )
    stored = MXFP4.name if kind is Kind.packed else saved.dtype
    return Result(kind, record, stored, block_format.name, block_format.scale_rule, form.digests)


def _insert_quantizers(
    config: PipelineConfig, model: "PreTrainedModel", batches: Sequence[dict[str, Tensor]], directory: Path
) -> int:
    """Insert the fake quantizers, calibrate them, check that each runs, and save their state. Return their number."""
    from pipeline.models import fake_quantizers, quantizer_calls

    block_format = references.configured_format(config.format)
    fake_quantizers.insert(model, block_format, lambda quantized: _run(quantized, batches))
    if config.format.importance:
        fake_quantizers.calibrate_importance(model, lambda quantized: _run(quantized, batches))
    quantizers = fake_quantizers.count(model, block_format)
    with quantizer_calls.watch(model) as fired:
        _run(model, batches[:1])
    fired.raise_unless_all(model)
    fake_quantizers.save_state(model, directory)
    say(
        "quantize",
        f"{quantizers} quantizers round the experts to {block_format.name} (scale_rule={block_format.scale_rule});"
        " each ran, and no other quantizer did",
    )
    log_metrics(directory, {"quantizers": quantizers})
    return quantizers


def _writes_rounded(config: PipelineConfig) -> bool:
    return rounds_base(config.quantize, config.qat, config.format)


@dataclass(frozen=True)
class _Form:
    """The model in the form that QAT trains.

    Attributes:
        kind: kind of the stage's result.
        ref: the model. Its directory may be that of an earlier stage.
        record: record for artifact.json.
        digests: hashes of written files, see `Result`.
        method: the method that rounds the experts.
        scales: `base` or the rule that chose the scales of rounded experts. None if no rounded experts were written.
        account: figures of rounding, or None.
        fallback: counts of experts that GPTQ did not round, or None.
        candidates: figures of the roundings that `auto` tried, or None.
    """

    kind: Kind
    ref: ModelRef
    record: ModelRecord
    digests: dict[str, str] = field(default_factory=dict)
    method: str = RoundingMethod.nearest.name
    scales: str | None = None
    account: dict[str, float | None] | None = None
    fallback: dict[str, int] | None = None
    candidates: list[Candidate] | None = None


def _write_rounded(config: PipelineConfig, here: Run, ref: ModelRef, splits: Splits, directory: Path) -> _Form:
    """Write the model with merged adapters and rounded experts. For LoRA, it becomes a base below `directory`."""
    method, asked, candidates, weights = config.qat.method, config.quantize, None, Weights(ref)
    if asked.method is RoundingMethod.auto:
        job, asked, candidates = _choose(config, here, weights, splits, directory)
    else:
        job = _prepare(config, asked, here, weights, splits, directory=directory)
    into = directory / BASE_DIR if method is Method.lora else directory
    into.mkdir(exist_ok=True)
    is_packed = _packs(config, job.block_format)
    written = (rounding.write_packed if is_packed else rounding.write_plain)(job, into)
    prefix = f"{BASE_DIR}/" if method is Method.lora else ""
    is_result = is_packed and method is Method.bf16_parts
    dtype = torch.bfloat16 if is_result else ref.dtype
    return _Form(
        Kind.packed if is_result else Kind.checkpoint,
        replace(ref, directory=into, base=into, adapter=False, dtype=dtype),
        ModelRecord(dtype=dtype_name(dtype)),
        {f"{prefix}{name}": digest for name, digest in written.files.items()},
        asked.method.name,
        job.scales_name,
        report.account_for(written.notes, directory, asked.method.name),
        None if job.codes is None else report.fallback_for(job.codes.notes(), directory, asked),
        candidates,
    )


def _packs(config: PipelineConfig, block_format: BlockFormat) -> bool:
    """Return whether rounded experts are written packed."""
    return config.qat.method is not Method.full and block_format.stores_like(MXFP4)


def _choose(
    config: PipelineConfig, here: Run, weights: Weights, splits: Splits, directory: Path
) -> tuple[Job, QuantizeConfig, list[Candidate]]:
    """Try several roundings. Return the job and the settings of the best one, and the figures of all."""
    asked, block_format, ref = config.quantize, references.configured_format(config.format), weights.ref
    packed = origins.find_packed(here.require(Stage.upcast), asked, block_format)
    tried = selection.candidates(asked, block_format, has_own_scales=packed is not None)
    jobs = [_prepare(config, each, here, weights, splits, directory=directory) for each in tried]
    chosen = splits.validation.select(range(min(asked.auto_samples, len(splits.validation))))
    batches = losses.batches(chosen, asked.batch_size, load_tokenizer(ref.base).pad_token_id)
    say("quantize", f"auto: {len(jobs)} roundings are compared on {len(chosen)} validation examples")
    measure = partial(selection.measure, jobs, batches, attention.for_inference(ref.dtype))
    best, figures = selection.choose(tried, jobs, measure, directory)
    return jobs[best], tried[best], figures


def _prepare(
    config: PipelineConfig, asked: QuantizeConfig, here: Run, weights: Weights, splits: Splits, *, directory: Path
) -> Job:
    """Describe how `asked` rounds. GPTQ rounds now. Its codes lie below `directory` until the stage ends."""
    job, ref = _job(config, asked, here, weights), weights.ref
    if asked.method is not RoundingMethod.gptq:
        return job
    shape, per_token = job.weights.shape, job.weights.checkpoint.config["num_experts_per_tok"]
    seed = asked.seed if asked.fallback is Fallback.stochastic else None
    codes = gptq.round_layers(
        job,
        GptqSettings(asked.damping, asked.tokens_per_input, seed),
        losses.batches(
            calibration.for_gptq(splits.train, asked, shape, per_token),
            asked.batch_size,
            load_tokenizer(ref.base).pad_token_id,
        ),
        attention=attention.for_inference(ref.dtype),
        directory=directory / CHECKPOINTS_DIR / asked.method.name,
        output_bytes=rounding.output_bytes(job, is_packed=_packs(config, job.block_format)),
    )
    return replace(job, codes=codes)


def _written(directory: Path, kind: Kind, record: ModelRecord) -> ModelRef:
    """Describe the model that is written in `directory`. Its calibration is there too."""
    base = directory if record.base is None else directory.parent / record.base
    return ModelRef(Stage.quantize.name, directory, base, kind is Kind.adapter, dtype=getattr(torch, record.dtype))


def _measure(config: PipelineConfig, here: Run, ref: ModelRef, directory: Path) -> dict[str, float | None] | None:
    """Account for the rounding of the fake quantizers. Return None if the upcast was removed."""
    if not here.is_complete(Stage.upcast):
        say("quantize", "no account of the rounding: it compares with the upcast, which was removed")
        return None
    notes = rounding.measure(_job(config, config.quantize, here, Weights(ref)))
    return report.account_for(notes, directory, config.quantize.method.name)


def _job(config: PipelineConfig, asked: QuantizeConfig, here: Run, weights: Weights) -> Job:
    """Describe how `asked` rounds a model."""
    upcast, block_format = here.require(Stage.upcast), references.configured_format(config.format)
    packed = origins.find_packed(upcast, asked, block_format)
    is_stochastic = asked.method is RoundingMethod.stochastic
    return Job(
        weights,
        Checkpoint(upcast.directory),
        packed,
        block_format,
        origins.choose_rule(asked, packed, block_format.scale_rule),
        asked.seed if is_stochastic else None,
        loading.device_of(config.device),
    )


def _take_form(method: Method, ref: ModelRef, directory: Path) -> _Form:
    """Link or write the model with the experts as they were trained."""
    whole = ModelRecord(dtype=dtype_name(ref.dtype))
    if method is not Method.lora and (ref.adapter or (ref.is_packed and method is Method.full)):
        change = "merging SFT's adapters" if ref.adapter else "decoding the experts to BF16"
        say("quantize", f"qat trains {'every weight' if method is Method.full else 'the BF16 parts'}: {change}")
        digests = saving.write_plain(ref, directory).files
        written = replace(ref, directory=directory, base=directory, adapter=False)
        return _Form(Kind.checkpoint, written, whole, digests)
    if ref.is_foreign:
        ref = foreign_sft.copy(ref, directory)
    elif method is not Method.lora or ref.adapter:
        for path in sorted(p for p in ref.directory.iterdir() if p.name not in BOOKKEEPING and p.is_file()):
            link_or_copy(path, directory / path.name)
    if not ref.adapter:
        return _Form(Kind.packed if ref.is_packed else Kind.checkpoint, ref, whole)
    return _Form(Kind.adapter, ref, replace(whole, base=os.path.relpath(ref.base, directory.parent)))


def _calibration_batches(config: PipelineConfig, train: Dataset, ref: ModelRef) -> Sequence[dict[str, Tensor]]:
    block_format = references.configured_format(config.format)
    is_calibrated = block_format.quantizes_activations or config.format.importance
    chosen = calibration.for_format(train, config.quantize, block_format.name, is_calibrated=is_calibrated)
    return losses.batches(chosen, config.quantize.batch_size, load_tokenizer(ref.base).pad_token_id)


def _run(model: Any, batches: Sequence[Any]) -> None:
    losses.measure(model, batches)
