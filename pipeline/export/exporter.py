"""Defines the interface `Exporter`. Each target's file creates one instance, named `EXPORTER`."""

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
    """Writes a target's layout, and defines how to read the layout back.

    Attributes:
        write: writes a job's model into a directory. Each note in the result has `tensors`, the names of tensors.
            `is_copied` says whether these tensors have the source's bytes. A note on experts has five more entries:
            `layer`, `sums`, `saturated_blocks`, `copied_experts` and `other_than_trained`. Account documents `sums`,
            and ExpertStack documents the last three.
        kind: artifact kind of the export directory.
        layout: takes the sizes of a model. Returns the stored tensors for each tensor of the plain layout.
        describe: takes the base model and the names of the stored tensors. Returns the description that the export
            must have.
        check_source: takes the content of the base model's config.json and its directory. Raises UserError if the
            layout cannot describe the model, or if a package is missing.
        mark: part of a tensor name that occurs only in this layout, or None.
        open: opens the files of a directory.
        read_description: reads the description of the model from a directory. The description is config.json or the
            metadata of a file.
        optional: takes the sizes of a model. Returns the additional tensors that a directory may have. A directory has
            all of these tensors or none.
        load_optional: takes the directory of a model with quantized inputs. Returns the values that the optional
            tensors must have.
        records: names of the files that the export has in addition to the base model's files.
        is_one_file: whether a single file holds everything, including the tokenizer and the configuration.
    """

    write: Callable[[Job, Path], Written]
    kind: Kind
    layout: Callable[[Shape], Layout]
    describe: Callable[[Checkpoint, Collection[str]], Mapping[str, object]]
    check_source: Callable[[Mapping[str, object], Path], object] = lambda config, directory: None
    mark: str | None = None
    open: Callable[[Path], Files] = TensorFiles
    read_description: Callable[[Path], Mapping[str, object]] = read_config
    optional: Callable[[Shape], dict[str, TensorInfo]] = lambda shape: {}
    load_optional: Callable[[Path], dict[str, Tensor]] = lambda model: {}
    records: tuple[str, ...] = ()
    is_one_file: bool = False
