"""The interface of a target's file: `EXPORTER`, which writes the layout and defines how to read it back."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

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
    """A layout: how to write it and how to read it back.

    Attributes:
        write: writes a job's model into a directory. Each note has `tensors` (names) and `is_copied` (whether they have
            the source's bytes). Notes on experts also have `layer`, `copied_experts`, `other_than_trained` and the
            `sums` of Survival.
        kind: kind of the directory's artifact.
        layout: sizes of a model -> the stored tensors for each tensor of the plain layout.
        describe: (base model, names of stored tensors) -> the description that the export must have.
        mark: part of a tensor name that occurs in no other layout, or None.
        open: opens the files of a directory.
        read_description: reads the description of the model from a directory: config.json, or metadata.
        optional: tensors that a directory may have in addition. It has all of them or none.
        load_optional: directory of a model with quantized inputs -> the values that the optional tensors must have.
        records: names of files that the layout adds to the base model's files.
        is_one_file: whether a single file holds everything, including tokenizer and configuration.
    """

    write: Callable[[Job, Path], Written]
    kind: Kind
    layout: Callable[[Shape], Layout]
    describe: Callable[[Checkpoint, Collection[str]], Mapping[str, object]]
    mark: str | None = None
    open: Callable[[Path], Files] = TensorFiles
    read_description: Callable[[Path], Mapping[str, object]] = read_config
    optional: Callable[[Shape], dict[str, TensorInfo]] = lambda shape: {}
    load_optional: Callable[[Path], dict[str, Tensor]] = lambda model: {}
    records: tuple[str, ...] = ()
    is_one_file: bool = False
