"""Writes NVFP4 for engines on Blackwell, in ModelOpt's layout: fused experts, packed along the input dimension.

A model that was trained for MXFP4 keeps its values in this export. The codes stay the same, and each scale of 32
values becomes two scales of 16 values. Each expert has one tensor scale.

Engines that multiply 4-bit weights with 4-bit inputs need a scale for the inputs. Only calibration can determine this
scale, and only models of the format `nvfp4_w4a4` have it. For other models, the metadata say that inputs stay in BF16.

The layout follows two sources. The tensors follow SGLang's loader for gpt-oss in NVFP4. The file
`hf_quant_config.json` follows ModelOpt 0.47.

Legend: E = number of experts, `in` and `out` = sizes of a projection's inputs and outputs, nb = number of blocks in a
row (`in` divided by 16).
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
from pipeline.export.layout import Codes, Held, Layout, others_layout, restore_signed_zeros
from pipeline.export.mxfp4 import legacy_config
from pipeline.export.weights import ExpertStack, Packed, open_base, others_piece, stacks, write_checkpoint
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
        UserError: see `mxfp4.write`. Also raised if NVFP4 cannot represent the scales of MXFP4 blocks.
    """
    base = open_base(job)
    scales = load_input_scales(job.weights.ref.directory) if job.block_format.quantizes_activations else {}
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [_stack_piece(stack) for stack in stacks(job, base)]
    pieces += [_input_scale_piece(name, scale) for name, scale in scales.items()]
    config = describe(base, [name for piece in pieces for name in piece.tensors])
    record = config.pop(RECORD)
    written = write_checkpoint(job, base, directory, pieces=pieces, config=config)
    write_json(directory / RECORD, record)
    return written


def layout(shape: Shape) -> Layout:
    """Map each plain tensor to its stored tensors. ModelOpt decodes them."""
    stacks = {
        each.name: Held(_tensors(each), decode=_decode_by_modelopt, codes=_codes) for each in expert_projections(shape)
    }
    return others_layout(shape) | stacks


def input_scale_tensors(shape: Shape) -> dict[str, TensorInfo]:
    """Return the additional tensors in the export of a model with quantized inputs."""
    return {f"{each.name}{_INPUT_SCALE}": TensorInfo("F32", ()) for each in expert_projections(shape)}


def load_input_scales(model: Path) -> dict[str, Tensor]:
    """Load the calibrated input scale of each expert stack from a model with quantized inputs."""
    amax = load_calibration(model).amax
    names = {name: f"{name.removesuffix('_input_quantizer')}{_INPUT_SCALE}" for name in amax}
    return {names[name]: tensor_scale_for_amax(amax[name].float().reshape(()), INPUT_RULE) for name in amax}


def describe(base: Checkpoint, tensors: Collection[str]) -> dict[str, object]:
    """Return the content of config.json for an export with these tensors.

    Under the key RECORD, the result also has the content of the file RECORD.
    """
    record = _record(any(name.endswith(_INPUT_SCALE) for name in tensors))
    config = {key: value for key, value in legacy_config(base.config).items() if key != "quantization_config"}
    return {**config, "quantization_config": _in_config(record), RECORD: record}


def read_description(directory: Path) -> dict[str, object]:
    """Read config.json. Under the key RECORD, the result also has the content of the file RECORD.

    Raises:
        UserError: a file cannot be read.
    """
    return {**read_config(directory), RECORD: read_config(directory, RECORD)}


def _stack_piece(stack: ExpertStack) -> Piece:
    """Store a stack as packed codes (E, in / 2, out), scales (E, in / 16, out) and tensor scales (E)."""
    tensors, name = _tensors(stack.projection), stack.projection.name
    held: list[Packed] = []

    def put(made: Packed) -> Iterator[tuple[str, Tensor]]:
        packed = _convert(made, name)
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
    """Return the stored tensors of a stack: codes, scales and tensor scales."""
    name, experts, columns = projection.name, projection.experts, projection.out_features
    return {
        name: TensorInfo("U8", (experts, projection.in_features // 2, columns)),
        f"{name}_weight_scale": TensorInfo("F8_E4M3", (experts, projection.in_features // NVFP4.block_size, columns)),
        f"{name}_weight_scale_2": TensorInfo("F32", (experts,)),
    }


def _codes(packed: Tensor, scales: Tensor, tensor_scale: Tensor) -> Codes:
    """Convert the stored tensors to blocks (E, out, nb, 8), scales (E, out, nb) and tensor scales (E)."""
    blocks = packed.transpose(1, 2).unflatten(-1, (-1, NVFP4.block_size // 2))
    return Codes(blocks.contiguous(), scales.transpose(1, 2).contiguous(), tensor_scale)


def _decode_by_modelopt(packed: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Decode the stored tensors to (E, out, in) float32."""
    # Import here: importing ModelOpt and TRL takes ten seconds, and writing an export does not need them.
    from pipeline.models import fake_quantizers

    codes = _codes(packed, scales, tensor_scale)
    return restore_signed_zeros(fake_quantizers.nvfp4_values(codes.blocks, codes.scales, tensor_scale), codes)


def _convert(made: Packed, name: str) -> Packed:
    """Convert experts to NVFP4 without changing their values.

    Raises:
        UserError: the scales of an expert's MXFP4 blocks differ by more than NVFP4 can represent.
    """
    if made.tensor_scale is not None:
        return made
    converted = mxfp4_to_nvfp4(made.blocks, made.scales)
    if converted.changed_blocks:
        raise UserError(
            f"{name}: {converted.changed_blocks} MXFP4 blocks would change their values in NVFP4. Within an expert,"
            " NVFP4's scales span only 17 powers of two. To round the weights anew, set format=nvfp4"
            " export.requantize=true."
        )
    return replace(made, blocks=converted.blocks, scales=converted.scales, tensor_scale=converted.tensor_scale)


def _input_scale_piece(name: str, scale: Tensor) -> Piece:
    return piece_in_one_step({name: TensorInfo("F32", ())}, lambda: {name: scale})


def _record(quantizes_inputs: bool) -> dict[str, Any]:
    """Return the content of hf_quant_config.json."""
    return {
        "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
        "quantization": {
            "quant_algo": "NVFP4" if quantizes_inputs else "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": NVFP4.block_size,
            "exclude_modules": QUANTIZATION_CONFIG["modules_to_not_convert"],
        },
    }


def _in_config(record: dict[str, Any]) -> dict[str, object]:
    """Convert hf_quant_config.json to the `quantization_config` of config.json, as ModelOpt does."""
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
    describe=describe,
    mark="_weight_scale",
    read_description=read_description,
    optional=input_scale_tensors,
    load_optional=load_input_scales,
    records=(RECORD,),
)
