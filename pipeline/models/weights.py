"""Read the weights of a saved model one at a time, by name, with adapters merged."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import Shape, expert_projections, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import STEP_BYTES
from pipeline.models.calibration import load_calibration
from pipeline.models.references import ModelRef
from pipeline.numerics.codec import fake_quantize

if TYPE_CHECKING:
    from pipeline.models.merging import Merger


class Weights:
    """The weights of a model, read one at a time by their names in the plain layout, with adapters merged."""

    def __init__(self, ref: ModelRef) -> None:
        """Open the checkpoint and the adapters that `ref` names."""
        self.ref = ref
        self.checkpoint = Checkpoint(ref.base)
        self.shape: Shape = self.checkpoint.shape
        self._experts = {projection.name for projection in expert_projections(self.shape)}
        self._merger = _load_merger(ref) if ref.adapter else None
        self._importance = load_calibration(ref.directory).importance

    def names(self) -> list[str]:
        """List every tensor of the plain layout."""
        return list(plain_tensors(self.shape))

    def parts(self, name: str) -> list[slice]:
        """Split a tensor into slices along its first dimension, so that each slice takes little memory.

        Adapted weights of attention are not split.
        """
        shape = plain_tensors(self.shape)[name].shape
        adapted = self._merger is not None and name in self._merger
        if adapted and name not in self._experts:
            return [slice(0, shape[0])]
        row_bytes = self.ref.dtype.itemsize * math.prod(shape[1:])
        starts = range(0, shape[0], max(1, STEP_BYTES // row_bytes))
        return [slice(start, end) for start, end in pairwise([*starts, shape[0]])]

    def read_stored(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """Read the stored tensors of a weight. `read_trained` takes them as `stored`."""
        return self.checkpoint.read_stored(name, rows)

    def read_trained(
        self, name: str, rows: slice = slice(None), stored: tuple[Tensor, ...] | None = None, device: str = "cpu"
    ) -> Tensor:
        """Read the weight that training updates, or one slice of it (see `parts`).

        Stored MXFP4 is decoded. The result is not fake-quantized. Adapters are always merged on the CPU, because
        PEFT's merge of attention depends on the device. `verify` repeats the merge on the CPU.
        """
        stored = self.read_stored(name, rows) if stored is None else stored
        if self._merger is None or name not in self._merger:
            return self.checkpoint.decode_stored(name, stored, rows=rows, device=device)
        base = self.checkpoint.decode_stored(name, stored, rows=rows)
        return self._merger.merge(name, base, rows.start or 0).to(device)

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Read rows of the weight that training updates. Unlike `read_trained`, this takes any rows."""
        first, end, _ = rows.indices(plain_tensors(self.shape)[name].shape[0])
        pieces = [
            self.read_trained(name, part)[max(first - part.start, 0) : end - part.start]
            for part in self.parts(name)
            if part.start < end and part.stop > first
        ]
        return torch.cat(pieces)

    def read_effective(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read rows of the weight that the forward pass uses: rounded, if the model fake-quantizes this weight."""
        weight = self.read_trained(name, rows)
        if self.ref.block_format is None or name not in self._experts:
            return weight
        importance = self.importance(name)
        return fake_quantize(weight.transpose(1, 2), self.ref.block_format, importance=importance).transpose(1, 2)

    def importance(self, name: str) -> Tensor | None:
        """Return the importance of an expert weight's input channels, or None.

        Its shape is (in). It is used to choose scales.
        """
        return self._importance.get(name)

    def is_changed(self, name: str) -> bool:
        """Return whether the result of `read_effective` can differ from the weight in the base checkpoint."""
        quantized = self.ref.block_format is not None and name in self._experts
        return quantized or (self._merger is not None and name in self._merger)


def _load_merger(ref: ModelRef) -> "Merger":
    from transformers import AutoConfig

    from pipeline.models.merging import Merger

    return Merger(ref.directory, AutoConfig.from_pretrained(ref.base), ref.dtype)
