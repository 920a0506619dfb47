"""quantize: inserts fake quantizers into the fine-tuned model's experts. The result is the PTQ baseline for QAT.

The model first takes the form that QAT trains. For full training, SFT's adapters are merged. For LoRA, a full
checkpoint gets new adapters. For training of the BF16 parts, the experts are rounded now, and frozen later. Quantizers
come last: if an adapter were attached to weights that already have a quantizer, this quantizer would never run.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.dtypes import dtype_name
from pipeline.checkpoints.side_files import copy_side_files, link_or_copy
from pipeline.config import Method, PipelineConfig, QuantizeSource, Stage, packs_rounded, raise_if_nothing_to_round
from pipeline.data.examples import prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.export.packing import pack_rounded
from pipeline.models import loading, losses, placement, references, saving
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import BOOKKEEPING, Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say
from pipeline.runs.records import ModelRecord, QuantizeRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

_SETTINGS = ("data", "format", "quantize", "qat.method", "qat.lora", "qat.precision", "qat.seed")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/quantize: the fine-tuned model with fake quantizers. Check that every quantizer runs."""
    here = Run(config)
    raise_if_nothing_to_round(config.quantize.source, config.sft, config.format.name)
    references.configured_format(config.format)  # a wrong setting ends the run before the data is read
    from_sft = config.quantize.source is QuantizeSource.sft
    start = here.require(Stage.sft) if from_sft else references.require_upcast(here, config.model.path)
    rows = load_rows(here, config.data)
    return build(
        here,
        Stage.quantize,
        settings=_SETTINGS,
        parents={start.stage: start.fingerprint},
        work=lambda directory: _quantize(config, here, references.of_artifact(start), rows, directory),
        data=rows.fingerprint,
    )


def _quantize(config: PipelineConfig, here: Run, ref: ModelRef, rows: Rows, directory: Path) -> Result:
    from pipeline.models import adapters, attention, fake_quantizers, quantizer_calls

    block_format = references.configured_format(config.format)
    kind, start, saved = _take_form(config, ref, directory)
    placement.raise_if_host_too_small("quantize", start.base, start.dtype)
    chosen = attention.for_inference(start.dtype)
    model = placement.place(loading.load_quantized(start, start.dtype, attn_implementation=chosen))
    if config.qat.method is Method.lora and not start.adapter:
        model = adapters.attach(model, config.qat, "qat")
        kind, saved = saving.save(model, start, directory, train=config.qat, shared=config.sharding)
    batches = _calibration_batches(config, here, rows, ref)
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
    record = QuantizeRecord(dtype=saved.dtype, base=saved.base, quantizers=quantizers)
    form = MXFP4.name if kind is Kind.packed else saved.dtype
    return Result(kind, record, form, block_format.name, block_format.scale_rule)


def _take_form(config: PipelineConfig, ref: ModelRef, directory: Path) -> tuple[Kind, ModelRef, ModelRecord]:
    """Bring the model into the form that QAT trains. Return its kind, the model, and the record for artifact.json."""
    method, whole = config.qat.method, ModelRecord(dtype=dtype_name(ref.dtype))
    here = replace(ref, directory=directory, base=directory, adapter=False)
    if packs_rounded(config.qat, config.format):
        say("quantize", "qat trains the BF16 parts: packing the rounded experts as MXFP4")
        block_format, device = references.configured_format(config.format), loading.device_of(config.device)
        pack_rounded(Weights(ref), block_format, directory, device=device)
        copy_side_files(ref.base, directory)
        return Kind.packed, replace(here, dtype=torch.bfloat16), ModelRecord(dtype=dtype_name(torch.bfloat16))
    if method is not Method.lora and (ref.adapter or (ref.is_packed and method is Method.full)):
        change = "merging SFT's adapters" if ref.adapter else "decoding the experts to BF16"
        say("quantize", f"qat trains {'every weight' if method is Method.full else 'the BF16 parts'}: {change}")
        saving.write_plain(ref, directory)
        return Kind.checkpoint, here, whole
    if method is not Method.lora or ref.adapter:
        for path in sorted(p for p in ref.directory.iterdir() if p.name not in BOOKKEEPING and p.is_file()):
            link_or_copy(path, directory / path.name)
    if not ref.adapter:
        return Kind.packed if ref.is_packed else Kind.checkpoint, ref, whole
    return Kind.adapter, ref, replace(whole, base=os.path.relpath(ref.base, directory.parent))


def _calibration_batches(config: PipelineConfig, here: Run, rows: Rows, ref: ModelRef) -> Sequence[Any]:
    tokenizer = load_tokenizer(ref.base)
    train = prepare_examples(here, config.data, rows, tokenizer).train
    is_calibrated = references.configured_format(config.format).quantizes_activations or config.format.importance
    if is_calibrated and len(train) < config.quantize.calibration_samples:
        raise UserError(
            f"quantize.calibration_samples={config.quantize.calibration_samples}: format={config.format.name.name} is"
            f" calibrated on the data, which has {len(train)} training examples. Use more data, or set a lower"
            " number. The scales are less reliable with fewer examples."
        )
    chosen = train.select(range(min(config.quantize.calibration_samples, len(train))))
    return losses.batches(chosen, config.quantize.batch_size, tokenizer.pad_token_id)


def _run(model: Any, batches: Sequence[Any]) -> None:
    losses.measure(model, batches)
