"""What calibration found, as a stage keeps it beside its model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CALIBRATION_FILE = "calibration.pt"


@dataclass(frozen=True)
class Calibration:
    """Results of calibration.

    Attributes:
        importance: expert weight -> (in) float32, how much an error in each input channel counts. May be empty.
        amax: input quantizer -> largest magnitude that it saw. Empty if inputs are not quantized.
    """

    importance: dict[str, Tensor]
    amax: dict[str, Tensor]


def load_calibration(directory: Path) -> Calibration:
    """The calibration that a stage saved; an empty one if it saved none."""
    path = directory / CALIBRATION_FILE
    return Calibration(**torch.load(path, weights_only=True)) if path.is_file() else Calibration({}, {})
