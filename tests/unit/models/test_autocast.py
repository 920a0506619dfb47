"""The type of matrix products follows autocast."""

import torch

from pipeline.models.autocast import compute_dtype


def test_the_compute_type_is_autocasts_if_it_is_on() -> None:
    weight = torch.zeros(1)
    assert compute_dtype(weight) is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(weight) is torch.bfloat16
