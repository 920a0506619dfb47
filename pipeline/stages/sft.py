"""sft: fine-tunes the upcast checkpoint with supervision: in full, with adapters, or only its BF16 parts.

With `sft.start`, training continues from an earlier fine-tuning.
"""

from dataclasses import fields
from pathlib import Path

from pipeline.config import Method, PipelineConfig, Stage, TrainConfig
from pipeline.data.examples import prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.models import continuing, loading, placement, references, saving, sharding
from pipeline.models.references import ModelRef
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.records import TrainingRecord
from pipeline.runs.run import START, Run
from pipeline.training import resume

_SETTINGS = ("data", *(f"sft.{each.name}" for each in fields(TrainConfig)))
"""Settings that count. `sft.start` does not: its fingerprint is a parent, so that runs can be moved."""


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/sft: the fine-tuned checkpoint, or its adapters. Packed experts stay packed."""
    here = Run(config)
    upcast = references.require_upcast(here, config.model.path)
    sharding.raise_if_impossible(config.sharding)
    earlier = continuing.find_start(here, upcast, config.sft)
    start = earlier or references.of_artifact(upcast)
    if earlier is None:
        _raise_if_in_other_form(here, config.sft.method, start)
    rows = load_rows(here, config.data)
    return build(
        here,
        Stage.sft,
        settings=_SETTINGS,
        parents={"upcast": upcast.fingerprint} | ({} if earlier is None else {START: earlier.fingerprint}),
        work=lambda directory: _train(config, here, start, rows, directory),
        data=rows.fingerprint,
        resumable_as=resume.by_global_batch,
        on_every_process=True,
        keeps_metrics=True,
    )


def _raise_if_in_other_form(here: Run, method: Method, upcast: ModelRef) -> None:
    if method is Method.full and upcast.is_packed:
        again = here.command(Stage.upcast, "upcast.experts=bf16", "overwrite=true")
        raise UserError(
            f"sft.method=full: the experts in {upcast.directory} are packed and cannot be trained. Decode them:"
            f" {again}. Or use sft.method=lora."
        )
    if method is Method.bf16_parts and not upcast.is_packed:
        again = here.command(Stage.upcast, "upcast.experts=null", "overwrite=true")
        raise UserError(
            f"sft.method=bf16_parts: the experts in {upcast.directory} are not packed, so their MXFP4 bytes would not"
            f" reach the export unchanged. Link the packed experts: {again}"
        )


def _train(config: PipelineConfig, here: Run, start: ModelRef, rows: Rows, directory: Path) -> Result:
    from pipeline.evaluate import samples
    from pipeline.models import adapters
    from pipeline.training import attention_check, trainer
    from pipeline.training.weight_changes import WeightChanges

    attention = attention_check.check(config.sft, "sft")
    tokenizer = load_tokenizer(start.base)
    splits = prepare_examples(here, config.data, rows, tokenizer)
    copies = placement.copies_in_host_memory(config.sharding)
    placement.raise_if_host_too_small("sft", start.base, loading.TRAIN_DTYPES[config.sft.precision], copies)
    adapted = config.sft.method is Method.lora and not start.adapter
    attach = (lambda model: adapters.attach(model, config.sft, "sft", is_factored=True)) if adapted else None
    model = loading.load_to_train(start, config.sft, attention, config.sharding, attach)
    changes = WeightChanges(model, references.configured_format(config.format))
    looks = samples.callback(here, config.data, config.evaluate, rows=rows, tokenizer=tokenizer, directory=directory)
    inputs = trainer.Inputs(model, tokenizer, splits, changes, callbacks=looks)
    figures = trainer.train(inputs, trainer.Setup(config.sft, "sft", directory, config.sharding))
    kind, saved, digests = saving.save(model, start, directory, train=config.sft, shared=config.sharding)
    details = {**figures, **saved.details(), "attn_implementation": attention}
    if config.sft.start is not None:
        details["start"] = continuing.relative_path(start.directory, directory.parent)
    form = MXFP4.name if kind is Kind.packed else saved.dtype
    return Result(kind, TrainingRecord.from_details(details), form, digests=digests)
