"""The Hugging Face layout of openai/gpt-oss: MXFP4 experts, everything else BF16, config.json as the source has it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts import write_json
from pipeline.checkpoints import CONFIG, Piece, copy_side_files, write_sharded
from pipeline.errors import UserError
from pipeline.gpt_oss import QUANTIZATION_CONFIG, ExpertProjection, expert_projections, other_tensors
from pipeline.models import Weights
from pipeline.numerics.codec import CodecError, encode
from pipeline.numerics.formats import MXFP4
from pipeline.source import Source

_DIALECT = ("rope_parameters", "dtype", "torch_dtype")


def write(weights: Weights, source: Source, directory: Path, shard_bytes: int) -> dict[str, Any]:
    """Stream `weights` into `directory`, expert by expert.

    Raises:
        UserError: NaN or Inf in a weight, or an input dimension that 32 does not divide: names tensor, expert, block;
            a source of other sizes.
    """
    experts = {projection.name: projection for projection in expert_projections(weights.shape)}
    for projection in experts.values():
        _raise_if_not_divisible(projection)
    base = source.open()
    if weights.shape != base.shape:
        raise UserError(
            f"{weights.ref.directory} has {weights.shape}, but model.path={source.directory} has {base.shape}:"
            " the export takes its configuration from model.path, which must be the model that training started from."
        )
    pieces = [_other_piece(weights, name, info) for name, info in other_tensors(weights.shape).items()] + [
        _expert_piece(weights, projection) for projection in experts.values()
    ]
    pieces.sort(key=lambda piece: _order(next(iter(piece.tensors))))
    total = write_sharded(directory, pieces, shard_bytes, "export")
    copy_side_files(source.directory, directory)
    write_json(directory / CONFIG, released_config(base.config))
    return {"tensor_bytes": total, "encoded_tensors": len(experts), "other_tensors": len(pieces) - len(experts)}


def released_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the export: the source's; a BF16 source's gets the quantization and the rope keys of the original.

    transformers 5 writes `rope_parameters`; the engines read `rope_scaling` and `rope_theta`.
    """
    if "quantization_config" in config:
        return config
    released = {key: value for key, value in config.items() if key not in _DIALECT}
    rope = config.get("rope_parameters")
    if rope:
        released["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        released["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 150000))
    return {**released, "quantization_config": QUANTIZATION_CONFIG}


def _other_piece(weights: Weights, name: str, info: Any) -> Piece:
    def make() -> dict[str, Tensor]:
        tensor = weights.trained(name).to(torch.bfloat16)
        if not bool(tensor.isfinite().all()):
            index = (~tensor.isfinite()).nonzero()[0].tolist()
            raise UserError(f"{weights.ref.directory}: {name}: NaN or Inf at index {index}. Training went wrong.")
        return {name: tensor}

    return Piece({name: info}, make)


def _expert_piece(weights: Weights, projection: ExpertProjection) -> Piece:
    def make() -> dict[str, Tensor]:
        encoded = []
        for i, expert in enumerate(weights.trained(projection.name)):  # (in, out)
            try:
                encoded.append(encode(expert.T.contiguous(), MXFP4))
            except CodecError as error:
                row, block = error.block or (None, None)
                raise UserError(
                    f"{weights.ref.directory}: {projection.name}: expert {i}, row {row}, block {block}: {error}."
                    " Training went wrong."
                ) from error
        blocks, scales = zip(*encoded, strict=True)
        return {projection.blocks: torch.stack(blocks), projection.scales: torch.stack(scales)}

    return Piece(projection.packed_tensors(), make)


def _raise_if_not_divisible(projection: ExpertProjection) -> None:
    if projection.in_features % MXFP4.block_size:
        raise UserError(
            f"{projection.name}: expert 0, block {projection.in_features // MXFP4.block_size}: the input dimension"
            f" {projection.in_features} is not a multiple of {MXFP4.block_size}, the block size of {MXFP4.name}."
        )


def _order(name: str) -> tuple:
    """Layer by layer, in numeric order, so that a shard holds whole layers."""
    return tuple(int(part) if part.isdigit() else -1 for part in name.split(".")[:3]), name
