"""Fake quantization of the expert weights through ModelOpt, with our codec behind it. The only importer of modelopt.

ModelOpt keeps the books: which quantizers there are, what is saved and restored. The numbers are the codec's, through
ModelOpt's public hook for backends, so that training sees the bits that export writes, on any device.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend
from torch import Tensor

from pipeline.adapters import base_of, parameter_name
from pipeline.errors import CheckFailed
from pipeline.gpt_oss import EXPERT_WEIGHTS
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import FORMATS, BlockFormat

STATE_FILE = "modelopt_state.pth"
"""Name that ModelOpt's own `enable_huggingface_checkpointing` looks for."""

_BACKEND = "pipeline_codec"
_SUFFIX = "_weight_quantizer"
_EXPERT_QUANTIZERS = f"*mlp.experts*_proj{_SUFFIX}"


def _entrypoint(inputs: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """ModelOpt hands in the weights as (E, out, in): blocks run along the last dimension."""
    return fake_quantize(inputs, FORMATS[quantizer.backend_extra_args["format"]])


# Said of every module type when processes are many; tensor parallelism, which it is about, is not used here.
warnings.filterwarnings("ignore", message="Distributed training is initialized but no parallel_state")


def register_backend() -> None:
    """Make the codec known to ModelOpt; needed before quantizers are inserted or restored."""
    if not is_registered_quant_backend(_BACKEND):
        register_quant_backend(_BACKEND, _entrypoint)


def insert(model: Any, block_format: BlockFormat, calibrate: Callable[[Any], None]) -> None:
    """Put a fake quantizer on each expert weight, in place; adapters must be attached before.

    Args:
        model: a gpt-oss model, adapted or not.
        block_format: a row of FORMATS.
        calibrate: runs calibration data through the model, for formats with calibrated scales.
    """
    register_backend()
    mtq.quantize(base_of(model), _quant_cfg(block_format), forward_loop=calibrate)


def save_state(model: Any, directory: Path) -> None:
    """Write which quantizers the model has."""
    torch.save(mto.modelopt_state(base_of(model)), directory / STATE_FILE)


def restore(model: Any, directory: Path, block_format: BlockFormat) -> None:
    """Put the quantizers saved in `directory` back, in place, and count them."""
    register_backend()
    mto.restore_from_modelopt_state(base_of(model), modelopt_state_path=str(directory / STATE_FILE))
    count(model, block_format)


def count(model: Any, block_format: BlockFormat) -> int:
    """How many quantizers are on: two per layer, those of the expert weights and no other.

    Raises:
        CheckFailed: others are on, or some of these are not, or they are of another format.
    """
    base = base_of(model)
    expected = {
        f"model.layers.{i}.mlp.experts.{p}" for i in range(base.config.num_hidden_layers) for p in EXPERT_WEIGHTS
    }
    found = {quantized_parameter(name): quantizer for name, quantizer in _enabled(base)}
    wrong = sorted(expected ^ found.keys()) + [
        f"{name} ({quantizer.backend_extra_args})"
        for name, quantizer in found.items()
        if quantizer.backend != _BACKEND or quantizer.backend_extra_args.get("format") != block_format.name
    ]
    if wrong:
        raise CheckFailed(
            f"fake quantization: {len(found)} quantizers are on, expected the {len(expected)} expert weights in"
            f" {block_format.name}; wrong: {', '.join(wrong[:6])}"
        )
    return len(found)


@dataclass
class Fired:
    """What ran in a forward pass: parameter -> number of calls, of the quantizers that changed values."""

    calls: dict[str, int]

    def raise_unless_all(self, model: Any) -> None:
        """Check that every quantizer that is on has run, and nothing else.

        Raises:
            CheckFailed: naming those that did not run, or should not have.
        """
        expected = {quantized_parameter(name) for name, _ in _enabled(base_of(model))}
        silent, stray = sorted(expected - self.calls.keys()), sorted(self.calls.keys() - expected)
        if silent or stray:
            raise CheckFailed(f"fake quantization: did not run: {silent or 'none'}; ran unasked: {stray or 'none'}")


@contextmanager
def watch(model: Any, see: Callable[[str, Tensor], None] | None = None) -> Iterator[Fired]:
    """Record which quantizers run inside the block.

    Args:
        model: with quantizers.
        see: called with a parameter's plain name and its fake-quantized values (E, out, in), as the forward uses them.
    """
    fired = Fired({})
    hooks = []
    for name, module in base_of(model).named_modules():
        if isinstance(module, TensorQuantizer):
            hooks.append(module.register_forward_hook(_hook(quantized_parameter(name), fired, see)))
    try:
        yield fired
    finally:
        for hook in hooks:
            hook.remove()


def quantized_parameter(quantizer_name: str) -> str:
    """Plain name of the parameter behind a quantizer."""
    return parameter_name(quantizer_name).removesuffix(_SUFFIX)


def _hook(name: str, fired: Fired, see: Callable[[str, Tensor], None] | None) -> Callable:
    def hook(module: TensorQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if module.is_enabled:
            fired.calls[name] = fired.calls.get(name, 0) + 1
            if see is not None:
                see(name, output)

    return hook


def _enabled(model: Any) -> Iterator[tuple[str, TensorQuantizer]]:
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


def _quant_cfg(block_format: BlockFormat) -> dict[str, Any]:
    """As ModelOpt's MXFP4_MLP_WEIGHT_ONLY_CFG, for the expert stacks alone and with our backend.

    ModelOpt's own pattern (*mlp*weight_quantizer) would also switch on quantizers of adapters on experts, which never
    run.
    """
    weights = {
        "num_bits": (2, 1),
        "block_sizes": {-1: block_format.block_size, "type": "dynamic", "scale_bits": (8, 0)},
        "backend": _BACKEND,
        "backend_extra_args": {"format": block_format.name},
    }
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": _EXPERT_QUANTIZERS, "cfg": weights},
    ]
    return {"quant_cfg": rules, "algorithm": None}
