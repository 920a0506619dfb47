"""qat: the quantized model trained on at a low learning rate, the forward pass rounding the experts as export will."""

from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig, Stage
from pipeline.data.examples import prepare_examples
from pipeline.data.rows import Rows, load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.models import loading, references, saving, sharding
from pipeline.models.references import ModelRef
from pipeline.numerics.formats import BlockFormat
from pipeline.runs import artifacts
from pipeline.runs.artifacts import Artifact, Result
from pipeline.runs.console import warn
from pipeline.runs.processes import is_main_process

_SETTINGS = ("data", "format", "qat")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/qat: the trained model, its quantizers in place."""
    start = artifacts.require(config, Stage.quantize)
    sharding.raise_if_impossible(config.sharding)
    _raise_if_quantized_otherwise(references.of_artifact(start), references.configured_format(config))
    _warn_of_what_sft_was(config, start)
    rows = load_rows(config)
    return artifacts.build(
        config,
        Stage.qat,
        _SETTINGS,
        {"quantize": start.fingerprint},
        lambda directory: _train(config, references.of_artifact(start), rows, directory),
        data=rows.fingerprint,
        on_every_process=True,
    )


def _raise_if_quantized_otherwise(start: ModelRef, wanted: BlockFormat) -> None:
    have = start.block_format
    if have is not None and have != wanted:
        raise UserError(
            f"{start.directory} was made for format={have.name} with format.scale_rule={have.scale_rule}, but"
            f" format={wanted.name} with format.scale_rule={wanted.scale_rule} is asked for. Run stage=quantize again"
            f" with overwrite=true, or use format={have.name} format.scale_rule={have.scale_rule}."
        )


def _warn_of_what_sft_was(config: PipelineConfig, start: Artifact) -> None:
    if Stage.sft.name not in start.parents:
        warn(
            "qat",
            f"{start.directory} was made with quantize.source=upcast, so nothing has been fine-tuned yet. Published"
            " results have QAT after SFT, whose task it keeps through rounding, and never instead of it: at QAT's low"
            " rate a task is hardly learnt.",
        )
        return
    sft = artifacts.require(config, Stage.sft).settings["sft.learning_rate"]
    same_method = config.qat.method is config.sft.method  # adapters learn at ten times the rate of full weights
    if same_method and config.qat.learning_rate > sft:
        warn(
            "qat",
            f"qat.learning_rate={config.qat.learning_rate} is above the {sft} that sft was trained at: QAT settles the"
            " weights on the grid, and a high rate undoes what was learnt. 1e-5 to 5e-6 is usual.",
        )


def _train(config: PipelineConfig, start: ModelRef, rows: Rows, directory: Path) -> Result:
    from pipeline.evaluate import samples
    from pipeline.models import fake_quantizers, rounded_weights
    from pipeline.training import attention_check, trainer
    from pipeline.training.weight_changes import WeightChanges

    attention_check.check(config.qat, "qat")
    block_format = references.configured_format(config)
    tokenizer = load_tokenizer(start.base)
    splits = prepare_examples(config, rows, tokenizer)
    model = loading.load_to_train(start, config.qat)
    changes = WeightChanges(model, block_format)  # before frozen experts are rounded in place
    rounded = fake_quantizers.keep_rounded(model, rounded_weights.budget_bytes(config))
    looks = samples.callback(config, rows, tokenizer, directory, "qat")
    inputs = trainer.Inputs(model, tokenizer, splits, changes, rounded, _teacher(config), looks)
    with fake_quantizers.watch(model) as fired:
        details = trainer.train(inputs, trainer.Setup(config.qat, "qat", directory, config.sharding))
    fired.raise_unless_all(model)
    details["quantizers"] = fake_quantizers.count(model, block_format)
    kind, where = saving.save(model, start, directory, config.qat, config)
    if is_main_process():
        fake_quantizers.save_state(model, directory)
    return Result(kind, where["dtype"], block_format.name, block_format.scale_rule, {**details, **where})


def _teacher(config: PipelineConfig) -> Any:
    """The SFT model, if it is to be learnt from."""
    from pipeline.models import packing_masks
    from pipeline.training.distillation import Teacher

    settings = config.qat.distillation
    if not settings.weight:
        return None
    sft = references.stage_ref(config, Stage.sft)
    model = loading.load_effective(sft, sft.dtype)
    if config.qat.packing:
        packing_masks.keep_apart(model)
    return Teacher(model, settings.weight, settings.temperature)
