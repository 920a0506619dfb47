"""Write models to disk.

- `save` writes a trained model, or only its adapters. It gathers them from all processes. If the experts are packed,
  their blocks and scales are copied from the model that training started from.
- `write_plain` writes a saved model as a full checkpoint. It merges adapters into the weights.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG, read_config, write_config
from pipeline.checkpoints.dtypes import dtype_name, stored_name
from pipeline.checkpoints.gpt_oss import (
    ExpertProjection,
    Shape,
    TensorInfo,
    expert_projections,
    other_tensors,
    plain_tensors,
)
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import SHARD_BYTES, STEP_BYTES, Piece, Step, Written, sort_by_layer, write_sharded
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, copy_side_files
from pipeline.config import Sharding, TrainConfig
from pipeline.models import sharding
from pipeline.models.adapted_names import is_factor
from pipeline.models.loading import TRAIN_DTYPES
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.runs.artifacts import SHARDS_FILE, Kind
from pipeline.runs.json_files import write_json
from pipeline.runs.processes import is_main_process
from pipeline.runs.records import ModelRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save(
    model: "PreTrainedModel", ref: ModelRef, directory: Path, *, train: TrainConfig, shared: Sharding
) -> tuple[Kind, ModelRecord, dict[str, str]]:
    """Write a trained model and the side files of `ref`. Training started from `ref`.

    This is a collective call. config.json is copied from `ref`, and only the type is changed. If transformers wrote the
    file, it would rename settings, such as those of RoPE, and older engines would misread the file.

    Returns:
        The kind of the model, its record, and the XXH3-128 of each weight file that was hashed while it was written.
        `of_artifact` uses the record to find the model again.
    """
    from pipeline.models.adapters import is_adapted
    from pipeline.models.packed_experts import is_packed

    dtype = sharding.saved_dtype(train, TRAIN_DTYPES[train.precision], shared)
    if is_main_process():
        copy_side_files(ref.base, directory)
    if is_adapted(model):
        save_adapters(model, directory, ref.base)
        base = os.path.relpath(ref.base, directory.parent)
        return Kind.adapter, ModelRecord(dtype=dtype_name(dtype), base=base), {}
    if is_packed(model):
        digests = _save_packed(model, ref, directory)
        return Kind.packed, ModelRecord(dtype=dtype_name(torch.bfloat16)), digests
    layout = plain_tensors(Shape.of(model.config.to_dict(), directory), stored_name(dtype))
    digests = _save_whole(model, directory, layout, dtype, [])
    if is_main_process():
        write_config(directory, read_config(ref.base), dtype)
        Checkpoint(directory).close()
    return Kind.checkpoint, ModelRecord(dtype=dtype_name(dtype)), digests


def save_adapters(model: "PreTrainedModel", directory: Path, base: Path) -> None:
    """Gather all adapters on every process, which is cheap because adapters are small. The main process writes them.

    The saved files name the base by its path from `directory`. PEFT would write its absolute path into them, so equal
    adapters would have other bytes in another place. PEFT also writes a model card, which would replace the base's. So
    PEFT writes into a directory of its own. If a save was interrupted, the next one removes this directory.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if is_factor(name):
            with sharding.gather(parameter) as whole:
                state[name] = whole.detach().cpu().clone()
    if is_main_process():
        unfinished = directory / "adapters.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)  # left by an interrupted save
        # Otherwise PEFT would look for the base's config.json in the working directory and on the Hub.
        model.save_pretrained(str(unfinished), state_dict=state, save_embedding_layers=False)
        _write_adapter_config(unfinished / ADAPTER_CONFIG, model, os.path.relpath(base, directory))
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            (unfinished / name).replace(directory / name)
        shutil.rmtree(unfinished)


def _write_adapter_config(path: Path, adapted: Any, base: str) -> None:
    """Name the base, and sort the lists that PEFT made from sets: their order depends on Python's hash seed."""
    (config,) = adapted.peft_config.values()
    sets = {name: sorted(value) for name, value in vars(config).items() if isinstance(value, set)}
    stored = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**stored, **sets, "base_model_name_or_path": base})


def _save_packed(model: "PreTrainedModel", ref: ModelRef, directory: Path) -> dict[str, str]:
    """Write the released layout: trained tensors in BF16, and the blocks and scales of the experts of `ref`."""
    base = Checkpoint(ref.base)
    frozen = [_copied_piece(base, projection) for projection in expert_projections(base.shape)]
    digests = _save_whole(model, directory, other_tensors(base.shape), torch.bfloat16, frozen)
    if is_main_process():
        write_json(directory / CONFIG, base.config)
        Checkpoint(directory).close()
    base.close()
    return digests


def _copied_piece(base: Checkpoint, projection: ExpertProjection) -> Piece:
    """Make a piece that copies the blocks and the scales of a stack, a few experts at a time."""
    layout = projection.packed_tensors()
    count = max(1, STEP_BYTES * projection.experts // layout[projection.blocks].bytes)

    def step(name: str, rows: slice) -> Step:
        return Step(lambda: base.read(name, rows), lambda stored: [(name, stored)])

    def steps() -> Iterator[Step]:
        for name in layout:
            for first in range(0, projection.experts, count):
                yield step(name, slice(first, min(first + count, projection.experts)))

    return Piece(layout, steps)


def _save_whole(
    model: "PreTrainedModel",
    directory: Path,
    layout: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    others: Sequence[Piece],
) -> dict[str, str]:
    """Gather one parameter at a time and write it to disk. All processes gather parameters in the same order.

    Return the XXH3-128 of each written file. Processes that write nothing return an empty dictionary.

    Args:
        model: the trained model.
        directory: directory to write.
        layout: name -> type and shape of each parameter to write.
        dtype: type of the written parameters.
        others: pieces of the checkpoint that are not parameters of the model.
    """
    parameters = dict(model.named_parameters())
    pieces = [_gathering_piece(name, info, parameters[name], dtype) for name, info in layout.items()]
    pieces = sort_by_layer([*pieces, *others]) if others else pieces
    if not is_main_process():
        for name in (name for piece in pieces for name in piece.tensors if name in layout):
            with sharding.gather(parameters[name]):
                pass
        return {}
    # Do not resume an interrupted save: its shards may have other weights. Besides, the other processes gather every
    # parameter, so this process must not skip the parameters in those shards.
    (directory / SHARDS_FILE).unlink(missing_ok=True)
    return write_sharded(directory, pieces, SHARD_BYTES, "saving").files


def _gathering_piece(name: str, info: TensorInfo, parameter: Tensor, dtype: torch.dtype) -> Piece:
    def make(_: None) -> Iterator[tuple[str, Tensor]]:
        with sharding.gather(parameter) as whole:
            yield name, whole.detach().to(dtype)

    return Piece({name: info}, lambda: [Step(lambda: None, make)])


def write_plain(ref: ModelRef, directory: Path) -> Written:
    """Stream a model to disk as a full checkpoint, in the type of training. Adapters are merged into the weights."""
    weights = Weights(ref)
    layout = plain_tensors(weights.shape, stored_name(ref.dtype))
    pieces = [plain_piece(weights, name, info, ref.dtype) for name, info in layout.items()]
    written = write_sharded(directory, pieces, SHARD_BYTES, "merging")
    copy_side_files(ref.base, directory)
    write_config(directory, weights.checkpoint.config, ref.dtype)
    return written


def plain_piece(weights: Weights, name: str, info: TensorInfo, dtype: torch.dtype, device: str = "cpu") -> Piece:
    """Make a piece that computes one weight, part by part. The weight is decoded and adapters are merged into it."""

    def step(rows: slice) -> Step:
        return Step(
            lambda: weights.read_stored(name, rows),
            lambda stored: [(name, weights.read_trained(name, rows, stored, device).to(dtype))],
        )

    return Piece({name: info}, lambda: [step(rows) for rows in weights.parts(name)])
