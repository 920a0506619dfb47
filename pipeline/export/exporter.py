"""What a target's file provides: `EXPORTER`, which writes the layout and says how to read it back."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.gpt_oss import Shape, TensorInfo
from pipeline.checkpoints.reading import Checkpoint, TensorFiles
from pipeline.checkpoints.shards import Written
from pipeline.export.job import Job
from pipeline.export.layout import Files, Layout
from pipeline.runs.artifacts import Kind


@dataclass(frozen=True)
class Exporter:
    """How a layout is written and read back.

    Attributes:
        write: (job, directory) -> what was written. Each note has `tensors` (names) and `is_copied` (whether they are
            the source's own bytes). Notes on experts also have `layer`, `copied_experts`, `other_than_trained` and the
            `sums` of Survival.
        kind: of the directory.
        layout: which stored tensors hold which tensor of the plain layout.
        described: (base model, names of stored tensors) -> what `said` must be.
        mark: part of a tensor's name that no other layout has; None for a layout without such a name.
        open: opens the files of a directory.
        said: what a directory says of its model.
        optional: tensors that a directory may also have, all or none.
        calibrated: (directory of a model with quantized inputs) -> the values that the optional tensors must have.
        records: files that the layout has in addition to the base model's.
        is_one_file: whether a single file holds everything, including tokenizer and configuration.
    """

    write: Callable[[Job, Path], Written]
    kind: Kind
    layout: Callable[[Shape], Layout]
    described: Callable[[Checkpoint, Collection[str]], dict[str, Any]]
    mark: str | None = None
    open: Callable[[Path], Files] = TensorFiles
    said: Callable[[Path], dict[str, Any]] = read_config
    optional: Callable[[Shape], dict[str, TensorInfo]] = lambda shape: {}
    calibrated: Callable[[Path], dict[str, Tensor]] = lambda model: {}
    records: tuple[str, ...] = ()
    is_one_file: bool = False
