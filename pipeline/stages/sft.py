"""sft: supervised fine-tuning of the upcast checkpoint, in full or with adapters."""

from pathlib import Path

from pipeline.config import Method, PipelineConfig, Stage
from pipeline.data.examples import prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.models import loading, references, saving, sharding
from pipeline.models.references import ModelRef
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact, Result

_SETTINGS = ("data", "sft")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/sft: the fine-tuned checkpoint, or its adapters."""
    upcast = references.require_upcast(config)
    sharding.raise_if_impossible(config.sharding)
    rows = load_rows(config)
    return artifacts.build(
        config,
        Stage.sft,
        _SETTINGS,
        {"upcast": upcast.fingerprint},
        lambda directory: _train(config, references.of_artifact(upcast), rows, directory),
        data=rows.fingerprint,
        on_every_process=True,
    )


def _train(config: PipelineConfig, start: ModelRef, rows: Rows, directory: Path) -> Result:
    from pipeline.evaluate import samples
    from pipeline.models import adapters
    from pipeline.training import attention_check, trainer
    from pipeline.training.weight_changes import WeightChanges

    attention_check.check(config.sft, "sft")
    tokenizer = load_tokenizer(start.base)
    splits = prepare_examples(config, rows, tokenizer)
    model = loading.load_to_train(start, config.sft)
    if config.sft.method is Method.lora:
        model = adapters.attach(model, config.sft, "sft")
    changes = WeightChanges(model, references.configured_format(config))
    looks = samples.callback(config, rows, tokenizer, directory, "sft")
    inputs = trainer.Inputs(model, tokenizer, splits, changes, callbacks=looks)
    details = trainer.train(inputs, trainer.Setup(config.sft, "sft", directory, config.sharding))
    kind, where = saving.save(model, start, directory, config.sft, config)
    return Result(kind, format=where["dtype"], details={**details, **where})
