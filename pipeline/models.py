"""The models of a run: where a stage's weights are, how they are loaded and saved, and what the forward pass uses.

A stage leaves a full checkpoint, or adapters on the checkpoint of an earlier stage, with or without fake quantizers.
`ModelRef` describes which. peft and modelopt take ten seconds to import, so this module imports them only for models
with adapters or quantizers.
"""

import gc
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import sharding
from pipeline.artifacts import ARTIFACT_FILE, SHARDS_FILE, Artifact, Kind, is_complete, load, require, stage_dir
from pipeline.checkpoints import (
    Checkpoint,
    copy_side_files,
    load_calibration,
    read_config,
    write_config,
)
from pipeline.config import Device, PipelineConfig, Stage, TrainConfig
from pipeline.dtypes import TRAIN_TYPES, dtype_name, stored_name, torch_dtype
from pipeline.errors import CheckFailed, UserError
from pipeline.gpt_oss import Shape, TensorInfo, expert_projections, plain_tensors
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import FORMATS, BlockFormat
from pipeline.shards import STEP_BYTES, Piece, Step, Written, write_sharded
from pipeline.source import sampled_fingerprint
from pipeline.tracking import is_main_process, say, shows_progress

MODEL_STAGES = (Stage.upcast, Stage.sft, Stage.quantize, Stage.qat, Stage.export)
"""Stages whose output is a model, in the order in which they run."""

TRAIN_DTYPES = {precision: torch_dtype(name) for precision, name in TRAIN_TYPES.items()}
"""Type of the weights while a stage trains in this precision."""

_ROOM = 1.3  # memory for a forward pass, as a multiple of the size of the weights


@dataclass(frozen=True)
class ModelRef:
    """A model on disk.

    Attributes:
        name: name of the stage, or the directory as the user gave it.
        directory: where the stage wrote the model.
        base: directory of the full checkpoint; the same as `directory` unless that has adapters.
        adapter: whether `directory` has adapters.
        block_format: format and scale rule that the forward pass rounds the experts to, or None.
        fingerprint: fingerprint of the artifact, or of a directory that is not an artifact.
        dtype: type of the weights in training. Adapters are merged in it.
    """

    name: str
    directory: Path
    base: Path
    adapter: bool = False
    block_format: BlockFormat | None = None
    fingerprint: str = ""
    dtype: torch.dtype = torch.bfloat16


def of_artifact(artifact: Artifact) -> ModelRef:
    """The model that a stage wrote.

    Raises:
        UserError: it is an export that transformers cannot load.
    """
    if artifact.kind is Kind.foreign:
        raise UserError(
            f"{artifact.directory} was exported in a layout that only inference engines load. Name another model of the"
            " run, or export with export.target=mxfp4."
        )
    adapter = artifact.kind is Kind.adapter
    return ModelRef(
        artifact.stage,
        artifact.directory,
        artifact.directory.parent / artifact.details["base"] if adapter else artifact.directory,
        adapter,
        format_of(artifact),
        artifact.fingerprint,
        getattr(torch, artifact.details.get("dtype", "bfloat16")),
    )


def format_of(artifact: Artifact) -> BlockFormat | None:
    """The format and scale rule that the artifact's forward pass rounds to, or None."""
    if artifact.fake_quantized is None:
        return None
    assert artifact.scale_rule is not None
    return FORMATS[artifact.fake_quantized].with_rule(artifact.scale_rule)


def configured_format(config: PipelineConfig) -> BlockFormat:
    """The format and scale rule in the configuration."""
    return FORMATS[config.format.name.name].with_rule(config.format.scale_rule.name)


def device_of(config: PipelineConfig) -> str:
    """The device for conversions: `cpu` or `cuda`.

    Raises:
        UserError: the configuration asks for a GPU, but there is none.
    """
    has_gpu = torch.cuda.is_available()
    if config.device is Device.cuda and not has_gpu:
        raise UserError("device=cuda: no GPU is visible here. Use device=auto or device=cpu.")
    return "cuda" if has_gpu and config.device is not Device.cpu else "cpu"


def find(config: PipelineConfig, source: str | None, among: tuple[Stage, ...], key: str) -> ModelRef:
    """The model that `key`=`source` names: a stage of this run, or a directory. None means the newest complete stage.

    Raises:
        UserError: the model is missing or unfinished, or the directory is not a model.
    """
    if source is None:
        newest = next((stage for stage in reversed(among) if is_loadable(config, stage)), among[0])
        ref = of_artifact(require(config, newest))
        say(config.stage.name, f"{key}: {newest.name}, the newest complete stage")
        return ref
    if source in Stage.__members__:  # for a directory with the name of a stage, give ./<name>
        stage = Stage[source]
        if stage not in among:
            raise UserError(f"{key}={source}: must be one of {', '.join(s.name for s in among)}, or a directory.")
        return of_artifact(require(config, stage))
    directory = Path(source).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"{key}={source}: neither a stage ({', '.join(s.name for s in among)}) nor a directory.")
    if (directory / ARTIFACT_FILE).is_file():
        ref = of_artifact(load(directory))
        return ref if directory == stage_dir(config, ref.name) else replace(ref, name=source)
    Checkpoint(directory).close()
    return ModelRef(source, directory, directory, fingerprint=sampled_fingerprint(directory))


def is_loadable(config: PipelineConfig, stage: Stage) -> bool:
    """Whether a stage of this run is complete and its model can be loaded by transformers."""
    directory = stage_dir(config, stage.name)
    return is_complete(config, stage) and load(directory, check_files=False).kind is not Kind.foreign


def stage_ref(config: PipelineConfig, stage: Stage) -> ModelRef:
    """The model of a complete stage of this run."""
    return of_artifact(require(config, stage))


def require_upcast(config: PipelineConfig) -> Artifact:
    """The complete upcast of this run.

    Raises:
        UserError: it is missing or unfinished, or was made from another model.
    """
    upcast = require(config, Stage.upcast)
    if upcast.settings["model.path"] != config.model.path:
        raise UserError(
            f"model.path={config.model.path}, but {upcast.directory} was made from {upcast.settings['model.path']}."
            " Set another run_dir, or give the model.path that this run began with."
        )
    return upcast


class Weights:
    """Reads the weights of a model one at a time, under their names in the plain layout, with adapters merged."""

    def __init__(self, ref: ModelRef) -> None:
        """Open the checkpoint and the adapters behind `ref`."""
        self.ref = ref
        self.checkpoint = Checkpoint(ref.base)
        self.shape: Shape = self.checkpoint.shape
        self._experts = {projection.name for projection in expert_projections(self.shape)}
        self._merger = _merger(ref) if ref.adapter else None
        self._importance = load_calibration(ref.directory).importance

    def names(self) -> list[str]:
        """Every tensor of the plain layout."""
        return list(plain_tensors(self.shape))

    def parts(self, name: str) -> list[slice]:
        """Split a tensor into slices of its first dimension, each of which is small in memory.

        A slice of an adapted expert stack has at least two experts. Other adapted weights are not split.
        """
        shape = plain_tensors(self.shape)[name].shape
        adapted = self._merger is not None and name in self._merger
        if adapted and name not in self._experts:
            return [slice(0, shape[0])]
        row_bytes = self.ref.dtype.itemsize * math.prod(shape[1:])
        count = max(2 if adapted else 1, STEP_BYTES // row_bytes)
        starts = list(range(0, shape[0], count))
        if adapted and len(starts) > 1 and shape[0] - starts[-1] == 1:
            starts.pop()
        return [slice(start, end) for start, end in pairwise([*starts, shape[0]])]

    def stored(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """The stored tensors behind a weight, as an argument for `trained`."""
        return self.checkpoint.read_stored(name, rows)

    def trained(
        self, name: str, rows: slice = slice(None), stored: tuple[Tensor, ...] | None = None, device: str = "cpu"
    ) -> Tensor:
        """The weight that training updates, or a slice of it from `parts`: not quantized, MXFP4 decoded.

        Adapters are merged on the CPU whatever `device` is, because `verify` checks them there.
        """
        stored = self.stored(name, rows) if stored is None else stored
        if self._merger is None or name not in self._merger:
            return self.checkpoint.decoded(name, stored, rows=rows, device=device)
        base = self.checkpoint.decoded(name, stored, rows=rows)
        return self._merger.merged(name, base, rows.start or 0).to(device)

    def effective(self, name: str) -> Tensor:
        """The weight that the forward pass uses: fake-quantized if the model fake-quantizes it."""
        weight = self.trained(name)
        if self.ref.block_format is None or name not in self._experts:
            return weight
        importance = self.importance(name)
        return fake_quantize(weight.transpose(1, 2), self.ref.block_format, importance=importance).transpose(1, 2)

    def importance(self, name: str) -> Tensor | None:
        """Importance (in) of the input channels of an expert weight when its scales are chosen, or None."""
        return self._importance.get(name)

    def is_changed(self, name: str) -> bool:
        """Whether `effective` can differ from the weight in the base checkpoint."""
        quantized = self.ref.block_format is not None and name in self._experts
        return quantized or (self._merger is not None and name in self._merger)


def _merger(ref: ModelRef) -> Any:
    from transformers import AutoConfig

    from pipeline.adapters import Merger

    return Merger(ref.directory, AutoConfig.from_pretrained(ref.base), ref.dtype)


def _quieten() -> None:
    """Silence transformers' progress bars if there is no terminal, and its warnings that MXFP4 kernels are missing."""
    from transformers.utils import logging

    if not shows_progress():
        logging.disable_progress_bar()
    logging.get_logger("transformers.quantizers.quantizer_mxfp4").setLevel(logging.ERROR)


def load_plain(directory: Path, dtype: torch.dtype, **arguments: Any) -> Any:
    """Load a checkpoint with transformers. MXFP4 is decoded.

    Raises:
        CheckFailed: a tensor is missing, unexpected or has another shape. (transformers only prints this.)
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    _quieten()
    if "quantization_config" in read_config(directory):
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, output_loading_info=True, **{"attn_implementation": "eager", **arguments}
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckFailed(f"{directory}: transformers could not load every tensor: {wrong}")
    for parameter in model.parameters():  # transformers 5.14 leaves decoded experts in BF16, whatever the dtype
        parameter.data = parameter.data.to(dtype)
    return model


def load_quantized(ref: ModelRef, dtype: torch.dtype, trainable: bool = False, **arguments: Any) -> Any:
    """Load a model with its adapters and its fake quantizers. The quantizers are checked."""
    model = load_plain(ref.base, dtype, **arguments)
    if ref.adapter:
        from pipeline import adapters

        model = adapters.load(model, ref.directory, trainable)
    if ref.block_format is not None:
        from pipeline import quantizer

        quantizer.restore(model, ref.directory, ref.block_format)
    return model


def load_to_train(ref: ModelRef, train: TrainConfig) -> Any:
    """Load a model for training, with the adapters and quantizers of `ref`, in `train.precision`."""
    from pipeline import documents, experts
    from pipeline.adapters import base_of

    model = load_quantized(
        ref,
        TRAIN_DTYPES[train.precision],
        trainable=True,
        attn_implementation=train.attn_implementation,
    )
    experts.use(model, train.experts_implementation, ref.block_format)
    model.config.use_cache = False
    if train.packing:
        documents.keep_apart(base_of(model))
    return model


def load_effective(ref: ModelRef, dtype: torch.dtype, **arguments: Any) -> Any:
    """Load a plain model that computes the same as `ref`: adapters are merged and experts are rounded.

    If inputs are quantized too, the model keeps its adapters and quantizers instead.
    """
    if ref.block_format is not None and ref.block_format.quantizes_activations:
        return place(load_quantized(ref, dtype, **arguments)).eval()
    model = load_plain(ref.base, dtype, **arguments)
    weights = Weights(ref)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if weights.is_changed(name):
                parameter.copy_(weights.effective(name))
    return place(model).eval()


def place(model: Any) -> Any:
    """Move the model to the GPU if there is one with enough free memory."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()  # otherwise memory of an earlier model counts as used
        needed = sum(parameter.nbytes for parameter in model.parameters())
        if torch.cuda.mem_get_info()[0] > _ROOM * needed:
            return model.to("cuda")
    return model


def save(
    model: Any, ref: ModelRef, directory: Path, train: TrainConfig, config: PipelineConfig
) -> tuple[Kind, dict[str, Any]]:
    """Write a trained model, with the side files of `ref`, the model that training started from.

    This is a collective call. config.json is the one of `ref` except for the type. transformers would rename settings
    in it, such as those of rope, and older engines would misread them.

    Returns:
        The kind of the model, and the details that `of_artifact` needs to find it again.
    """
    from pipeline.adapters import is_adapted

    dtype = sharding.saved_dtype(train, TRAIN_DTYPES[train.precision], config.sharding)
    details: dict[str, Any] = {"dtype": dtype_name(dtype)}
    if is_main_process():
        copy_side_files(ref.base, directory)
    if is_adapted(model):
        _save_adapters(model, directory)
        return Kind.adapter, {**details, "base": os.path.relpath(ref.base, directory.parent)}
    _save_whole(model, directory, dtype, config.upcast.shard_bytes)
    if is_main_process():
        write_config(directory, read_config(ref.base), dtype)
        Checkpoint(directory).close()
    return Kind.checkpoint, details


def _save_adapters(model: Any, directory: Path) -> None:
    """Gather all adapters on every process, which is cheap because they are small. The main process writes them."""
    from pipeline.adapters import is_factor

    state = {}
    for name, parameter in model.named_parameters():
        if is_factor(name):
            with sharding.gathered(parameter) as whole:
                state[name] = whole.detach().cpu().clone()
    if is_main_process():
        model.save_pretrained(directory, state_dict=state)


def _save_whole(model: Any, directory: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    """Stream the parameters to disk, gathering one at a time. All processes gather them in the same order."""
    parameters = dict(model.named_parameters())
    layout = plain_tensors(Shape.of(model.config.to_dict(), directory), stored_name(dtype))
    if not is_main_process():
        for name in layout:
            with sharding.gathered(parameters[name]):
                pass
        return
    # Do not resume: shards from an interrupted save may have other weights, and the other processes gather everything.
    (directory / SHARDS_FILE).unlink(missing_ok=True)
    pieces = [_gathered_piece(name, info, parameters[name], dtype) for name, info in layout.items()]
    write_sharded(directory, pieces, shard_bytes, "saving")


def _gathered_piece(name: str, info: TensorInfo, parameter: Tensor, dtype: torch.dtype) -> Piece:
    def make(_: None) -> Iterator[tuple[str, Tensor]]:
        with sharding.gathered(parameter) as whole:
            yield name, whole.detach().to(dtype)

    return Piece({name: info}, lambda: [Step(lambda: None, make)])


def write_plain(ref: ModelRef, directory: Path, shard_bytes: int) -> Written:
    """Stream a model to disk as a plain full checkpoint, with adapters merged, in the type that training used."""
    weights = Weights(ref)
    layout = plain_tensors(weights.shape, stored_name(ref.dtype))
    pieces = [plain_piece(weights, name, info, ref.dtype) for name, info in layout.items()]
    written = write_sharded(directory, pieces, shard_bytes, "merging")
    copy_side_files(ref.base, directory)
    write_config(directory, weights.checkpoint.config, ref.dtype)
    return written


def plain_piece(weights: Weights, name: str, info: TensorInfo, dtype: torch.dtype, device: str = "cpu") -> Piece:
    """A piece that makes a weight part by part: decoded, and with adapters merged."""

    def step(rows: slice) -> Step:
        return Step(
            lambda: weights.stored(name, rows),
            lambda stored: [(name, weights.trained(name, rows, stored, device).to(dtype))],
        )

    return Piece({name: info}, lambda: [step(rows) for rows in weights.parts(name)])
