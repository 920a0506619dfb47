"""The results of calibration, which a stage saves beside its model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CALIBRATION_FILE = "calibration.pt"


@dataclass(frozen=True)
class Calibration:
    """Results of calibration.

    Attributes:
        importance: name of an expert stack -> one number for each input channel, shape (in), float32. When scales are
            chosen, squared errors are multiplied by these numbers. May be empty.
        amax: for each input quantizer, the largest magnitude of its inputs. Empty if inputs are not quantized.
    """

    importance: dict[str, Tensor]
    amax: dict[str, Tensor]


def load_calibration(directory: Path) -> Calibration:
    """Load the calibration that a stage saved, or an empty one if it saved none."""
    path = directory / CALIBRATION_FILE
    return Calibration(**torch.load(path, weights_only=True)) if path.is_file() else Calibration({}, {})
