"""sft: supervised fine-tuning of the upcast checkpoint, in full or with adapters."""

from pathlib import Path

from pipeline import artifacts, data, models, sharding
from pipeline.artifacts import Artifact, Result
from pipeline.checkpoints import load_tokenizer
from pipeline.config import Method, PipelineConfig, Stage
from pipeline.data import Rows
from pipeline.models import ModelRef

_SETTINGS = ("data", "sft")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/sft: the fine-tuned checkpoint, or its adapters."""
    upcast = models.require_upcast(config)
    sharding.raise_if_impossible(config.sharding)
    rows = data.load_rows(config)
    return artifacts.build(
        config,
        Stage.sft,
        _SETTINGS,
        {"upcast": upcast.fingerprint},
        lambda directory: _train(config, models.of_artifact(upcast), rows, directory),
        data=rows.fingerprint,
        on_every_process=True,
    )


def _train(config: PipelineConfig, start: ModelRef, rows: Rows, directory: Path) -> Result:
    from pipeline import adapters, attention, training
    from pipeline.drift import Drift

    attention.check(config.sft, "sft")
    tokenizer = load_tokenizer(start.base)
    splits = data.prepare(config, rows, tokenizer)
    model = models.load_to_train(start, config.sft)
    if config.sft.method is Method.lora:
        model = adapters.attach(model, config.sft, "sft")
    drift = Drift(model, models.configured_format(config))
    inputs = training.Inputs(model, tokenizer, splits, drift)
    details = training.train(inputs, training.Setup(config.sft, "sft", directory, config.sharding))
    kind, where = models.save(model, start, directory, config.sft, config)
    return Result(kind, format=where["dtype"], details={**details, **where})
