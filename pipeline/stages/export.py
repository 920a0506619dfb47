"""export: writes a checkpoint for serving, and reports how much of the training reached the 4-bit weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints.notes import Note
from pipeline.checkpoints.released import stop_problems
from pipeline.checkpoints.shards import Written
from pipeline.checkpoints.side_files import choose_side_files, describe_differences
from pipeline.config import PipelineConfig, Stage
from pipeline.errors import UserError, user_errors
from pipeline.export import EXPORTERS, account
from pipeline.export.account import Figures
from pipeline.export.job import Job
from pipeline.models import loading, references, source
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.comparison import share
from pipeline.numerics.formats import BlockFormat
from pipeline.runs.artifacts import MODEL_STAGES, Artifact, Result
from pipeline.runs.building import build
from pipeline.runs.console import say, warn
from pipeline.runs.records import ExportRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

_SETTINGS = ("export.source", "export.target", "export.requantize", "export.shard_bytes", "format")
_HARDLY_ANY = 0.05


def run(config: PipelineConfig) -> Artifact:
    """Write <run_dir>/export/<target> in the layout of `export.target`. Exports in other layouts stay as they are."""
    config = config.with_target()
    here = Run(config)
    ref = references.find(here, config.export.source, MODEL_STAGES, "export.source")
    block_format = references.configured_format(config.format)
    if not config.export.requantize:
        _raise_if_trained_otherwise(ref, block_format)
    base, device = source.locate(here, config.model), loading.device_of(config.device)
    _raise_if_it_does_not_stop(ref, base.directory, config.export.layout.name)

    def work(directory: Path) -> Result:
        job = Job(Weights(ref), base, block_format, config.export.shard_bytes, device)
        target = config.export.layout.name
        written = EXPORTERS[target].write(job, directory)
        own = _tell_of_own_files(base.directory, ref, EXPORTERS[target].is_one_file)
        record = _record(written, ref, target, directory, own)
        _tell_of_requantizing(ref, block_format, record)
        rule, digests = block_format.scale_rule, written.files
        return Result(EXPORTERS[target].kind, record, block_format.name, scale_rule=rule, digests=digests)

    parents = {"model": ref.fingerprint, "source": base.fingerprint}
    artifact = build(here, Stage.export, settings=_SETTINGS, parents=parents, work=work)
    if (repository := config.export.push_to_hub) is not None:
        say("export", f"export.push_to_hub={repository}: stage=publish uploads it, once stage=verify has passed")
    return artifact


def _raise_if_it_does_not_stop(ref: ModelRef, base: Path, target: str) -> None:
    """Refuse a model whose own generation config would be exported, and lacks a stop token of the base model's."""
    if not EXPORTERS[target].is_one_file and (problems := stop_problems(ref.directory, base)):
        raise user_errors([f"{problem}." for problem in problems])


def _tell_of_own_files(base: Path, ref: ModelRef, is_one_file: bool) -> list[str]:
    """Report the side files that the exported model has in place of the base model's, and return their names."""
    chosen = choose_side_files(base, ref.directory)
    differences = describe_differences(base, chosen)
    if differences and is_one_file:
        warn(
            "export",
            f"{', '.join(differences)}: {ref.directory} has files of its own, but this layout holds the tokenizer and"
            " the chat template of model.path. Set model.path to a model with the files that you want.",
        )
        return []
    for line in differences.values():
        say("export", line)
    return [name for name in differences if name in chosen]


def _record(written: Written, ref: ModelRef, target: str, directory: Path, own: list[str]) -> ExportRecord:
    """Log the figures of each layer and of the whole model, and return the record for artifact.json."""
    notes, layers = written.notes, account.stacks_of_layers(written.notes)
    for layer, stacks in layers.items():
        of_layer, rounding = _figures(stacks)
        log_metrics(directory, {"layer": layer, **of_layer, **rounding})
    experts = [note for stacks in layers.values() for note in stacks]
    whole, rounding = _figures(experts)
    copied = [name for note in notes if note["is_copied"] for name in note["tensors"]]
    figures: dict[str, Any] = {
        "tensor_bytes": written.bytes,
        "expert_weights": int(sum(note["sums"]["values"] for note in experts)),
        "copied_tensors": len(copied),
        "encoded_tensors": sum(len(note["tensors"]) for note in notes if not note["is_copied"]),
        "copied_experts": sum(note["copied_experts"] for note in experts),
        "other_than_trained": sum(note["other_than_trained"] for note in experts),
        **whole,
    }
    log_metrics(directory, {**figures, **rounding})
    record = ExportRecord(
        **figures,
        account=rounding,
        copied=copied,
        target=target,
        exported_from=ref.name,
        exported_directory=str(ref.directory),
        own_files=own or None,
    )
    _tell(record, rounding)
    if not record.moved_weights and all(note["is_copied"] for note in notes if "layer" not in note):
        warn(
            "export",
            f"every weight of {ref.name} is the base model's, so this export serves the base model. Was nothing"
            " trained, or does export.source name another model than you mean?",
        )
    return record


def _figures(stacks: Sequence[Note]) -> tuple[Figures, Figures]:
    """Return error and survival, and the account, of some stacks of experts."""
    sums = account.total(note["sums"] for note in stacks)
    saturated = sum(note["saturated_blocks"] for note in stacks)
    return {**sums.survival(), "saturated_blocks": share(saturated, sums.sums["blocks"])}, sums.figures()


def _tell(record: ExportRecord, rounding: Figures) -> None:
    noise = "" if record.snr_db is None else f"signal-to-noise {record.snr_db:.2f} dB, "
    say(
        "export",
        f"{record.encoded_tensors} tensors encoded, {record.copied_tensors} are the source's own bytes;"
        f" {noise}saturated blocks {record.saturated_blocks:.3%}",
    )
    if not record.moved_weights:
        say("export", "training did not move the expert weights; all 4-bit values are the base model's")
        return
    say(
        "export",
        f"training moved {record.moved_weights:.2%} of the expert weights; {record.changed_codes:.2%} of the"
        f" 4-bit values differ from the base model's ({record.survival:.2%} of the moved weights)",
    )
    say("export", account.describe(rounding, "rounding"))
    say("export", account.describe_blocks(rounding))
    if record.survival < _HARDLY_ANY:
        warn(
            "export",
            "hardly any of the fine-tuning of the experts reached the 4-bit weights: only"
            f" {record.survival:.2%} of the moved weights still differ from the base model after rounding. The others"
            " have the base model's values again. Measure the effect with stage=evaluate. To move more weights, raise"
            " qat.learning_rate or qat.max_steps, and run stage=qat and then stage=export with overwrite=true.",
        )


def _raise_if_trained_otherwise(ref: ModelRef, block_format: BlockFormat) -> None:
    trained = ref.block_format
    if trained is not None and trained != block_format:
        raise UserError(
            f"export.source={ref.name} was trained for format={trained.name} with scale_rule={trained.scale_rule}, but"
            f" the configuration sets format={block_format.name} with format.scale_rule={block_format.scale_rule}."
            " The exported weights would differ from the trained weights."
            f" Use format={trained.name} format.scale_rule={trained.scale_rule}, or"
            " export.requantize=true to round the trained weights anew and report the error."
        )


def _tell_of_requantizing(ref: ModelRef, block_format: BlockFormat, record: ExportRecord) -> None:
    if ref.block_format not in (None, block_format):
        share = record.other_than_trained / record.expert_weights
        warn(
            "export",
            f"export.requantize=true: {share:.2%} of the experts' weights differ from the weights that {ref.name} was"
            " trained with. Measure the loss before you serve it: run stage=evaluate on the same export with"
            " export.target=bf16.",
        )
