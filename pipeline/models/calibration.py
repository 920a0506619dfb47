"""The results of calibration, which a stage saves beside its model."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.plain_files import read_plain

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
    """Load the calibration that a stage saved, or an empty one if it saved none.

    Raises:
        UserError: the file is damaged, or is a pickle that could run code.
    """
    path = directory / CALIBRATION_FILE
    if not path.is_file():
        return Calibration({}, {})
    # `weights_only` is given, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD changes its default.
    return read_plain(
        path,
        lambda: Calibration(**torch.load(path, weights_only=True)),
        "a readable calibration of this program",
        "Remove it.",
    )
