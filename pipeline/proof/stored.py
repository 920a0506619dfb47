"""What an export stores: decoded weights, scales, and bytes that should be the source's own."""

from pathlib import Path

import torch
import xxhash
from torch import Tensor

from pipeline.checkpoints import Checkpoint
from pipeline.gpt_oss import expert_projections
from pipeline.numerics.formats import E8M0_NAN
from pipeline.proof.check import Check
from pipeline.shards import STEP_BYTES
from pipeline.tracking import progress


def decoded(checkpoint: Checkpoint, name: str, experts: slice = slice(None)) -> Tensor:
    """(E, out, in) float32 of some experts; MXFP4 is decoded by transformers."""
    if not checkpoint.is_packed:
        return checkpoint.read(name, experts).float().transpose(1, 2)
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = checkpoint.read_stored(name, experts)
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)


def check_scales(directory: Path) -> Check:
    """No scale of an export is NaN."""
    check = Check("scales: no NaN")
    export = Checkpoint(directory)
    for projection in expert_projections(export.shape):
        nan = export.read(projection.scales) == E8M0_NAN
        if bool(nan.any()):
            check.problems.append(f"{projection.scales}: {int(nan.sum())} scales are NaN (byte {E8M0_NAN})")
    return check


def check_copied(directory: Path, base: Path, names: list[str]) -> Check:
    """Tensors that the export says are the source's own: the hash of their stored bytes, read again from both."""
    check = Check("untouched tensors: the source's own bytes, by hash")
    export, reference = Checkpoint(directory), Checkpoint(base)
    for name in progress(names, what="untouched", unit="tensor"):
        if name not in export.tensors or name not in reference.tensors:
            check.problems.append(f"{name}: said to be the source's own, but is not in both checkpoints")
        elif _digest(export, name) != _digest(reference, name):
            check.problems.append(f"{name}: its bytes are not the source's")
    check.measured["tensors"] = len(names)
    return check


def parts(checkpoint: Checkpoint, name: str) -> list[slice]:
    """Rows of a stored tensor's first dimension that together make it, few enough at a time to be small in memory."""
    info = checkpoint.tensors[name]
    rows = max(1, STEP_BYTES // max(1, info.bytes // info.shape[0]))
    return [slice(start, start + rows) for start in range(0, info.shape[0], rows)]


def _digest(checkpoint: Checkpoint, name: str) -> str:
    """XXH3-128 of a tensor's stored bytes, a part at a time."""
    digest = xxhash.xxh3_128()
    for rows in parts(checkpoint, name):
        digest.update(checkpoint.read(name, rows).view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
