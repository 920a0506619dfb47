"""NVFP4 for engines on Blackwell, in the layout of ModelOpt: fused experts, packed along the input dimension.

A model that was trained for MXFP4 becomes NVFP4 with the same values: the codes stay, each scale of 32 becomes two of
16. Engines multiply in 4 bits on both sides and so need a scale for the inputs, which only calibration gives: a model
of `nvfp4_w4a4` brings it, others say in their metadata that inputs stay BF16. The tensor scale is one per expert.
Sources: the tensors that SGLang's loader binds for an NVFP4 gpt-oss; ModelOpt 0.47 (`hf_quant_config.json`).

Legend: E experts, in, out dimensions of the matrix.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.gpt_oss import (
    QUANTIZATION_CONFIG,
    ExpertProjection,
    Shape,
    TensorInfo,
    expert_projections,
    other_tensors,
)
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Piece, Written, piece_in_one_step
from pipeline.errors import UserError
from pipeline.export.exporter import Exporter
from pipeline.export.job import Job
from pipeline.export.layout import Codes, Held, Layout, others, with_signed_zeros
from pipeline.export.mxfp4 import legacy_config
from pipeline.export.weights import ExpertStack, Packed, checked_base, others_piece, stacks, write_checkpoint
from pipeline.models.calibration import load_calibration
from pipeline.numerics.convert import mxfp4_to_nvfp4
from pipeline.numerics.formats import NVFP4
from pipeline.numerics.scales import INPUT_RULE, tensor_scale_for_amax
from pipeline.runs.artifacts import Kind
from pipeline.runs.json_files import write_json

RECORD = "hf_quant_config.json"
_INPUT_SCALE = "_input_scale"


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: as exporting to `mxfp4`; MXFP4 blocks whose exponents NVFP4 cannot hold.
    """
    base = checked_base(job)
    scales = calibrated(job.weights.ref.directory) if job.block_format.quantizes_activations else {}
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [_stack(stack) for stack in stacks(job, base)]
    pieces += [_input_scale(name, scale) for name, scale in scales.items()]
    config = described(base, [name for piece in pieces for name in piece.tensors])
    record = config.pop(RECORD)
    written = write_checkpoint(job, base, directory, pieces, config)
    write_json(directory / RECORD, record)
    return written


def layout(shape: Shape) -> Layout:
    """What holds which tensor; ModelOpt decodes."""
    stacks = {each.name: Held(_tensors(each), decode=_by_modelopt, codes=_codes) for each in expert_projections(shape)}
    return others(shape) | stacks


def input_scales(shape: Shape) -> dict[str, TensorInfo]:
    """What a model with quantized inputs stores besides."""
    return {f"{each.name}{_INPUT_SCALE}": TensorInfo("F32", ()) for each in expert_projections(shape)}


def calibrated(model: Path) -> dict[str, Tensor]:
    """Of a model with quantized inputs the tensor scale of each expert stack's inputs, as training rounds them."""
    amax = load_calibration(model).amax
    names = {name: f"{name.removesuffix('_input_quantizer')}{_INPUT_SCALE}" for name in amax}
    return {names[name]: tensor_scale_for_amax(amax[name].float().reshape(()), INPUT_RULE) for name in amax}


def described(base: Checkpoint, tensors: Collection[str]) -> dict[str, Any]:
    """What config.json must say beside these tensors and, under its name, what RECORD must."""
    record = _record(any(name.endswith(_INPUT_SCALE) for name in tensors))
    config = {key: value for key, value in legacy_config(base.config).items() if key != "quantization_config"}
    return {**config, "quantization_config": _in_config(record), RECORD: record}


def said(directory: Path) -> dict[str, Any]:
    """What config.json and RECORD say.

    Raises:
        UserError: one of them cannot be read.
    """
    return {**read_config(directory), RECORD: read_config(directory, RECORD)}


def _stack(stack: ExpertStack) -> Piece:
    """Packed codes (E, in / 2, out), scales (E, in / 16, out) and tensor scales (E)."""
    tensors, name = _tensors(stack.projection), stack.projection.name
    held: list[Packed] = []

    def put(made: Packed) -> Iterator[tuple[str, Tensor]]:
        packed = _as_nvfp4(made, name)
        yield name, packed.blocks.flatten(-2).transpose(1, 2).contiguous()
        held.append(packed)
        if made.is_last:
            yield f"{name}_weight_scale", torch.cat([each.scales.transpose(1, 2).contiguous() for each in held])
            yield (
                f"{name}_weight_scale_2",
                torch.cat([each.tensor_scale for each in held if each.tensor_scale is not None]),
            )
            held.clear()

    return Piece(tensors, lambda: stack.steps(put), lambda: stack.note(list(tensors)))


def _tensors(projection: ExpertProjection) -> dict[str, TensorInfo]:
    """Codes, scales and tensor scales of a stack."""
    name, experts, columns = projection.name, projection.experts, projection.out_features
    return {
        name: TensorInfo("U8", (experts, projection.in_features // 2, columns)),
        f"{name}_weight_scale": TensorInfo("F8_E4M3", (experts, projection.in_features // NVFP4.block_size, columns)),
        f"{name}_weight_scale_2": TensorInfo("F32", (experts,)),
    }


def _codes(packed: Tensor, scales: Tensor, tensor_scale: Tensor) -> Codes:
    """What is stored -> (E, out, nb, 8), (E, out, nb) and (E)."""
    blocks = packed.transpose(1, 2).unflatten(-1, (-1, NVFP4.block_size // 2))
    return Codes(blocks.contiguous(), scales.transpose(1, 2).contiguous(), tensor_scale)


def _by_modelopt(packed: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """(E, out, in) float32."""
    from pipeline.models import (
        fake_quantizers,  # imports ModelOpt and TRL: ten seconds that writing an export does not need
    )

    codes = _codes(packed, scales, tensor_scale)
    return with_signed_zeros(fake_quantizers.nvfp4_values(codes.blocks, codes.scales, tensor_scale), codes)


def _as_nvfp4(made: Packed, name: str) -> Packed:
    """Some experts in NVFP4, with the values that they have.

    Raises:
        UserError: blocks of MXFP4 whose exponents are too far apart for it.
    """
    if made.tensor_scale is not None:
        return made
    converted = mxfp4_to_nvfp4(made.blocks, made.scales)
    if converted.changed_blocks:
        raise UserError(
            f"{name}: {converted.changed_blocks} blocks of MXFP4 would have other values in NVFP4, whose scales within"
            " an expert span 17 powers of two. Use format=nvfp4 export.requantize=true to round the weights anew."
        )
    return replace(made, blocks=converted.blocks, scales=converted.scales, tensor_scale=converted.tensor_scale)


def _input_scale(name: str, scale: Tensor) -> Piece:
    return piece_in_one_step({name: TensorInfo("F32", ())}, lambda: {name: scale})


def _record(quantizes_inputs: bool) -> dict[str, Any]:
    """hf_quant_config.json."""
    return {
        "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
        "quantization": {
            "quant_algo": "NVFP4" if quantizes_inputs else "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": NVFP4.block_size,
            "exclude_modules": QUANTIZATION_CONFIG["modules_to_not_convert"],
        },
    }


def _in_config(record: dict[str, Any]) -> dict[str, Any]:
    """The same in config.json, in ModelOpt's words for it."""
    quantization = record["quantization"]
    bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": quantization["group_size"]}
    sides = ("input_activations", "weights") if quantization["quant_algo"] == "NVFP4" else ("weights",)
    return {
        "config_groups": {"group_0": {**dict.fromkeys(sides, bits), "targets": ["Linear"]}},
        "ignore": quantization["exclude_modules"],
        "quant_algo": quantization["quant_algo"],
        "producer": record["producer"],
        "quant_method": "modelopt",
    }


EXPORTER = Exporter(
    write=write,
    kind=Kind.foreign,
    layout=layout,
    described=described,
    mark="_weight_scale",
    said=said,
    optional=input_scales,
    calibrated=calibrated,
    records=(RECORD,),
)
