"""Crossings of the running mean are counted, however often a value flips."""

import torch

from pipeline.training.flips import Flips


def test_a_value_that_flips_at_every_step_never_stops_to_count_as_flipping() -> None:
    flips = Flips(torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.zeros(1, 1, 1, dtype=torch.int8))
    for step in range(300):
        flips.add(torch.full((1, 1, 1), 1.0 if step % 2 else -1.0))
        assert bool(flips.have_crossed(2)) == (step >= 2), step
    assert int(flips.crossings.abs()) == 127
