"""Stores rounded layers while a model is rounded layer by layer, so that an interrupted run resumes at the last one.

Each layer is one safetensors file with the codes and scales of its experts. Next to it lies one file with the hidden
states after the newest layer. A file gets its final name only when it is complete and on the disk. Its digest lies in a
file beside it, so that a resumed run finds damage.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoints.gpt_oss import ExpertProjection
from pipeline.numerics.codec import decode
from pipeline.quantize.experts import RoundedExperts
from pipeline.runs.artifacts import digest_of
from pipeline.runs.console import warn
from pipeline.runs.durable import replacing, write_text

_STATES = "states"
_NOTE = "note"


class Coverage(TypedDict):
    """How GPTQ rounded a layer: the calibration tokens of each expert, and the experts that the fallback rounded."""

    tokens: list[int]
    fallback: list[int]


@dataclass(frozen=True)
class StoredExperts:
    """Rounded experts of a stack.

    Attributes:
        blocks: packed codes as in `codec.encode`, (E, out, nb, block / 2).
        scales: scales of the blocks, (E, out, nb).
        clipped: for each expert, the number of weights beyond the largest value of their block, (E) int64.
        tensor_scale: (E) float32, or None if the format has none.
    """

    blocks: Tensor
    scales: Tensor
    clipped: Tensor
    tensor_scale: Tensor | None = None

    def decode(self, dtype: torch.dtype, device: str) -> RoundedExperts:
        """Decode the values, on a device."""
        blocks, scales = self.blocks.to(device), self.scales.to(device)
        unit = None if self.tensor_scale is None else self.tensor_scale.to(device)
        values = decode(blocks, scales, dtype, unit).transpose(1, 2)
        return RoundedExperts(blocks, (scales, unit), values, int(self.clipped.sum()))

    def tensors(self, projection: ExpertProjection) -> dict[str, Tensor]:
        """Return the tensors to store for a stack, by name."""
        return {f"{projection.kind}.{name}": value for name, value in vars(self).items() if value is not None}


class LayerCodes:
    """The rounded layers in a directory."""

    def __init__(self, directory: Path) -> None:
        """Create the directory unless it is there."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def complete_layers(self, layers: int) -> int:
        """Return how many layers need no more work: all of them, or those whose result the newest states continue.

        All files are read, because a bit can have changed since they were written. Damaged files are reported.
        """
        done = 0
        while done < layers and _is_whole(self._layer(done)):
            done += 1
        return done if done == layers or not done or _is_whole(self._states(done - 1)) else 0

    def save(
        self, layer: int, stacks: Mapping[ExpertProjection, StoredExperts], note: Coverage, states: Tensor | None
    ) -> None:
        """Store a layer.

        Args:
            layer: number of the layer.
            stacks: the experts of each stack.
            note: JSON values that `notes` returns.
            states: hidden states after the layer, or None if no layer follows.
        """
        tensors = {name: each for stack, stored in stacks.items() for name, each in stored.tensors(stack).items()}
        if states is not None:
            _write(self._states(layer), {_STATES: states}, {})
        _write(self._layer(layer), tensors, {_NOTE: json.dumps(note)})
        if layer:
            for path in (self._states(layer - 1), _digest_file(self._states(layer - 1))):
                path.unlink(missing_ok=True)

    def states(self, layer: int, device: torch.device) -> Tensor:
        """Read the hidden states after a layer."""
        with safe_open(self._states(layer), "pt") as file:
            return file.get_tensor(_STATES).to(device)

    def notes(self) -> list[Coverage]:
        """Return the notes of the complete layers, in order."""
        found: list[Coverage] = []
        while self._layer(len(found)).is_file():
            with safe_open(self._layer(len(found)), "pt") as file:
                found.append(json.loads(file.metadata()[_NOTE]))
        return found

    def read(self, projection: ExpertProjection, rows: slice) -> StoredExperts:
        """Read some experts of a stack."""
        prefix = f"{projection.kind}."
        with safe_open(self._layer(projection.layer), "pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dictionary
            return StoredExperts(**{name.removeprefix(prefix): file.get_slice(name)[rows] for name in names})

    def _layer(self, layer: int) -> Path:
        return self._directory / f"layer-{layer:03}.safetensors"

    def _states(self, layer: int) -> Path:
        return self._directory / f"states-{layer:03}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, and then the file's XXH3-128 into a second file."""
    _digest_file(path).unlink(missing_ok=True)
    with replacing(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    write_text(_digest_file(path), digest_of(path))


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".xxh3")


def _is_whole(path: Path) -> bool:
    """Return whether a file is there and as it was written."""
    digest = _digest_file(path)
    if not path.is_file() or not digest.is_file():
        return False
    if digest.read_bytes() == digest_of(path).encode():
        return True
    warn("quantize", f"{path}: differs from the file before the interruption, so it is made again")
    return False
