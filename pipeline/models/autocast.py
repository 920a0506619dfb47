"""The type of arithmetic inside and outside of torch's autocast."""

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of matrix products with `weight`.

    Inside autocast, it is the type of autocast. Otherwise it is the type of `weight`.
    """
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
