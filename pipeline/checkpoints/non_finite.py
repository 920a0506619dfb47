"""Find NaN and Inf in tensors, on the device of the tensor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.numerics.formats import E8M0_NAN


@dataclass(frozen=True)
class NonFinite:
    """NaN and Inf in a tensor.

    Attributes:
        count: number of values that are NaN or Inf.
        first: index of the first such value.
        kind: the first such value, `NaN` or `Inf`.
    """

    count: int
    first: list[int]
    kind: str


def find_non_finite(values: Tensor) -> NonFinite | None:
    """Find NaN and Inf in floating-point values. Return None if there are none.

    Without a finding, the host waits for the device once.
    """
    if not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all()):
        return None
    bad = ~values.isfinite()
    first = bad.nonzero()[0].tolist()
    return NonFinite(int(bad.sum()), first, "NaN" if bool(values[tuple(first)].isnan()) else "Inf")


def find_nan_scales(scales: Tensor) -> NonFinite | None:
    """Find NaN in E8M0 scale bytes: the byte 255. Return None if there is none."""
    bad = scales == E8M0_NAN
    if not bool(bad.any()):
        return None
    return NonFinite(int(bad.sum()), bad.nonzero()[0].tolist(), f"NaN (byte {E8M0_NAN})")
