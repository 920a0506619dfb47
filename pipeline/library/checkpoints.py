"""Read, export and verify gpt-oss checkpoints by their paths. No run is needed, and none is made."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import SHARD_BYTES
from pipeline.checkpoints.side_files import choose_side_files, describe_differences
from pipeline.config import Device
from pipeline.config.targets import TARGETS
from pipeline.errors import MOST_PROBLEMS, UserError, did_you_mean, user_errors
from pipeline.export import EXPORTERS, recognize
from pipeline.export.job import Job
from pipeline.models import loading, references
from pipeline.models.foreign_adapters import holds_adapters
from pipeline.models.references import ModelRef
from pipeline.models.source import Source, sampled_fingerprint
from pipeline.models.weights import Weights
from pipeline.numerics.formats import FORMATS, SCALE_RULES, BlockFormat
from pipeline.runs import durable, other_libraries
from pipeline.runs.artifacts import SHARDS_FILE
from pipeline.runs.paths import absolute
from pipeline.verify import Check, check_against_base

Directory = str | PathLike[str]


def read_tensors(
    checkpoint: Directory, names: Iterable[str] | None = None, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor]]:
    """Read tensors of a checkpoint one at a time, with MXFP4 experts decoded.

    Args:
        checkpoint: directory of a gpt-oss checkpoint in the Hugging Face layout, MXFP4 or BF16.
        names: names in the BF16 layout, such as "model.layers.0.mlp.experts.down_proj". None reads all tensors.
        dtype: type of the decoded experts, bfloat16 or float32. Both hold the values exactly. Other tensors keep their
            stored type.

    Yields:
        Name and tensor. An expert tensor has the shape (experts, in, out).

    Raises:
        UserError: the directory is not a complete gpt-oss checkpoint, a name is unknown, or a scale is NaN.
    """
    opened = Checkpoint(_existing(checkpoint, "checkpoint"))
    known = plain_tensors(opened.shape)
    chosen = list(known) if names is None else list(names)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        problems = [f"names: {name!r} is no tensor of {checkpoint}.{did_you_mean(name, known)}" for name in unknown]
        raise user_errors(problems, most=MOST_PROBLEMS)
    return ((name, opened.read_plain(name, dtype)) for name in chosen)


def export_checkpoint(
    model: Directory,
    base: Directory,
    out: Directory,
    *,
    target: str = "mxfp4",
    format: str | None = None,
    scale_rule: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "auto",
) -> Path:
    """Write a model in the layout of an export target, and return the absolute path of `out`.

    The files are those of `run("export")`, without its artifact.json and figures. `out` appears when it is complete. To
    decode an MXFP4 checkpoint to BF16, give it as `model` and as `base`, with `target="bf16"`.

    Args:
        model: the model to export. It is the directory of a stage (`<run_dir>/qat`, also with adapters), or any gpt-oss
            checkpoint in the Hugging Face layout, or adapters that PEFT saved. These are merged on `base`.
        base: the base checkpoint. The export has its tokenizer, its configuration, and the bytes of equal weights.
        out: directory to make. It must be missing or empty.
        target: layout to write, a row of `pipeline.config.targets.TARGETS`.
        format: number format of the experts, a row of FORMATS. None: that of training, or the first of the target.
        scale_rule: rule that chooses the scales. None means the rule of training, or the format's default.
        shard_bytes: largest size of one weight file, in bytes.
        device: "auto", "cpu" or "cuda". All give the same bytes.

    Raises:
        UserError: an argument is wrong, the checkpoints do not fit each other or the format, or a weight is NaN or Inf.
    """
    other_libraries.silence()
    directory = absolute(out)
    _raise_if_wrong(target, format, scale_rule, device, directory)
    ref = _find_model(model, opened := _open_base(base))
    block_format = _block_format(ref, target, format, scale_rule)
    job = Job(Weights(ref), opened, block_format, shard_bytes, loading.device_of(Device[device]))
    with _appearing(directory) as unfinished:
        EXPORTERS[target].write(job, unfinished)
        (unfinished / SHARDS_FILE).unlink(missing_ok=True)
    return directory


def _open_base(base: Directory) -> Source:
    source = _existing(base, "base")
    Checkpoint(source).close()
    return Source(source, sampled_fingerprint(source))


def _find_model(model: Directory, base: Source) -> ModelRef:
    given = _existing(model, "model")
    return references.on_base(given, base) if holds_adapters(given) else references.in_directory(given)


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """Make a directory that gets its name when the block has ended. If the block fails, the directory is removed."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        durable.sync_tree(unfinished)
        unfinished.replace(directory)
    except OSError as error:
        raise UserError(f"out={str(directory)!r}: cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def verify_checkpoint(checkpoint: Directory, reference: Directory, model: Directory | None = None) -> list[Check]:
    """Check an exported checkpoint against its base model: its files, tensors, and gross errors of its weights.

    The layout is recognized from the files. Single wrong values are found only by comparing with the trained model. For
    this, use `run("verify")` on the run that made the export.

    Args:
        checkpoint: directory of the export, in any layout of `export_checkpoint`.
        reference: directory of the base checkpoint.
        model: directory of the exported model, if it has a tokenizer, chat template or generation config of its own.

    Returns:
        One result for each check. The export is wrong if a `status` is "FAILED". Then `problems` describes the errors.

    Raises:
        UserError: a directory is missing, or `reference` is not a complete gpt-oss checkpoint.
    """
    other_libraries.silence()
    directory, base = _existing(checkpoint, "checkpoint"), _existing(reference, "reference")
    own: dict[str, Path | None] = {}
    if model is not None:
        chosen = choose_side_files(base, _existing(model, "model"))
        own = {name: chosen[name] for name in describe_differences(base, chosen) if name in chosen}
    return check_against_base(directory, recognize(directory), base, own=own)


def _existing(path: Directory, name: str) -> Path:
    directory = absolute(path)
    if not directory.is_dir():
        raise UserError(f"{name}={str(path)!r}: no such directory.")
    return directory


def _raise_if_wrong(target: str, format: str | None, scale_rule: str | None, device: str, out: Path) -> None:
    """Check the arguments of `export_checkpoint` that need no model, and report all mistakes together."""
    devices = [each.name for each in Device]
    choices = {"target": (target, list(TARGETS)), "format": (format, list(FORMATS)), "device": (device, devices)}
    found = [
        f"{name}={value!r}: no such choice.{did_you_mean(value, known)} Choose from: {', '.join(known)}."
        for name, (value, known) in choices.items()
        if value is not None and value not in known
    ]
    if not found and format is not None and format not in TARGETS[target].holds:
        found.append(f"target={target!r}: cannot hold format={format!r}, only {', '.join(TARGETS[target].holds)}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        found.append(f"out={str(out)!r}: exists and is not empty. Move it away, or give another directory.")
    if found:
        raise user_errors(found)


def _block_format(ref: ModelRef, target: str, format: str | None, scale_rule: str | None) -> BlockFormat:
    """Return the format to export in.

    Raises:
        UserError: the model was trained for another format, or the scale rule does not exist.
    """
    trained = ref.block_format
    default = FORMATS[TARGETS[target].holds[0]] if trained is None else trained
    chosen = default if format in (None, default.name) else FORMATS[str(format)]
    rules = SCALE_RULES[chosen.scale_type]
    if scale_rule is not None and scale_rule not in rules:
        raise UserError(f"scale_rule={scale_rule!r}: {chosen.name} has {', '.join(rules)}.")
    chosen = chosen if scale_rule is None else chosen.with_rule(scale_rule)
    if trained is not None and chosen != trained:
        raise UserError(
            f"model={str(ref.directory)!r}: was trained for format={trained.name!r} with scale_rule="
            f"{trained.scale_rule!r}, not {chosen.name!r} with {chosen.scale_rule!r}. The export would have other"
            " weights than training used. Leave out format and scale_rule. To round anew, use run('export') with the"
            " override export.requantize=true, which reports the error."
        )
    if chosen.name not in TARGETS[target].holds:
        raise UserError(
            f"target={target!r}: cannot hold {chosen.name!r}, the model's format, only"
            f" {', '.join(TARGETS[target].holds)}."
        )
    return chosen
