"""Fake-quantize the expert weights with ModelOpt. Our codec is its backend.

ModelOpt inserts, saves and restores the quantizers. The codec computes the rounded values. ModelOpt calls the codec
through a public hook for backends. So training computes with the same bits that export writes, on any device.

This is the only module that imports modelopt.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend
from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend
from modelopt.torch.quantization.plugins import huggingface, peft
from modelopt.torch.quantization.plugins.huggingface import _transposed_quantize
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from torch import Tensor, nn

from pipeline.checkpoints.gpt_oss import EXPERT_PATTERN, EXPERT_WEIGHTS, expert_parameter
from pipeline.errors import CheckFailed, list_first
from pipeline.models import quantizer_backend
from pipeline.models.adapted_names import is_wrapped, parameter_name
from pipeline.models.adapters import base_of
from pipeline.models.autocast import compute_dtype
from pipeline.models.calibration import CALIBRATION_FILE, load_calibration
from pipeline.models.packed_experts import PackedExperts
from pipeline.models.packed_quantizers import QuantizedPackedExperts
from pipeline.models.plain_files import read_plain
from pipeline.models.quantizer_backend import INPUTS, WEIGHTS, format_of, state_of
from pipeline.models.rounded_weights import RoundedWeights
from pipeline.models.sharding import own_part
from pipeline.numerics.codec import straight_through
from pipeline.numerics.formats import MXFP4, BlockFormat, ScaleType
from pipeline.numerics.scales import INPUT_RULE
from pipeline.runs.other_libraries import hide_printed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATE_FILE = "modelopt_state.pth"
"""File name that ModelOpt's own `enable_huggingface_checkpointing` looks for."""

_BACKEND = "pipeline_codec"

Calibrate = Callable[["PreTrainedModel"], None]
Hook = Callable[[TensorQuantizer, tuple[Tensor, ...], Tensor], None]


def _round_stack(weight: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """Round a stack of weights (E, in, out), and cast it to the type that the forward pass computes in.

    Enabled adapters are already merged into the weights.

    This replaces a function of ModelOpt's plugins that transposes, rounds and transposes back in every forward pass.
    The replacement gives the codec a transposed view, and rounds weights again only when they have changed.
    """
    if not quantizer.is_enabled:
        return weight
    if not quantizer._if_quant:  # ModelOpt is calibrating
        return _transposed_quantize(weight, quantizer)
    state, dtype = state_of(quantizer), compute_dtype(weight)

    def make() -> Tensor:
        with torch.no_grad():
            return quantizer_backend.round_values(weight.transpose(1, 2), quantizer, dtype).transpose(1, 2)

    if state.is_rounded:
        result = weight
    else:
        # An adapted weight, base + delta, is not a Parameter. While adapters are disabled, the weight is only the base,
        # which is a Parameter. So the two get different keys.
        key = (quantizer, dtype, isinstance(weight, torch.nn.Parameter))
        rounded = make() if state.cache is None else state.cache.of(key, weight, make)
        result = straight_through(weight, rounded)
    for observe in state.observers:
        observe(result.detach().transpose(1, 2), 0)
    return result


_switching = huggingface._QuantGptOssExperts.quantize_weight


@contextmanager
def _quantize_weight(experts: huggingface._QuantGptOssExperts) -> Iterator[None]:
    """Switch on ModelOpt's quantization of weights around a forward pass, and always switch it off at the end.

    nvidia-modelopt 0.47 leaves quantization on if a forward pass ends early. Gradient checkpointing recomputes layers,
    and ends these forward passes early.
    """
    try:
        with _switching(experts):
            yield
    finally:
        experts._enable_weight_quantization = False


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Switch off all quantizers of a model inside the block. Weights that were rounded in place stay rounded."""
    quantizers = [quantizer for _, quantizer in find_enabled(model)]
    for quantizer in quantizers:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable()


def keep_rounded(model: nn.Module, budget_bytes: float, *, keeps_frozen: bool = False) -> RoundedWeights:
    """Round trained weights once per optimizer step, not once per forward pass. Round frozen weights now, in place.

    Args:
        model: a model with quantizers, and with its final adapters.
        budget_bytes: maximum size of the cache of rounded weights.
        keeps_frozen: whether frozen weights keep their unrounded values, because the caller needs them too. Rounded
            values are then cached. Otherwise, frozen weights are rounded in place.

    Returns:
        The cache. Call `forget` on it whenever weights have changed, and check `non_finite` before each step.
    """
    base = base_of(model)
    modules = dict(base.named_modules())
    cache = RoundedWeights(budget_bytes)
    for name, quantizer in find_enabled(base):
        state = state_of(quantizer)
        if name.endswith(WEIGHTS):
            owner, _, projection = name.removesuffix(WEIGHTS).rpartition(".")
            parameter = dict(modules[owner].named_parameters(recurse=False))[projection]
            if isinstance(modules[owner], PackedExperts):
                state.cache = cache
                state.is_rounded = format_of(quantizer).name == MXFP4.name  # rounding keeps values of the format
            elif parameter.requires_grad or is_wrapped(name) or keeps_frozen:
                state.cache = cache
            else:
                with own_part(parameter) as own:
                    if own.numel():
                        own.copy_(_round_stack(own, quantizer))
                state.is_rounded = True
        state.non_finite = cache.non_finite
    return cache


def register_backend() -> None:
    """Register the codec as a backend of ModelOpt. Call this before quantizers are inserted or restored."""
    if not is_registered_quant_backend(_BACKEND):
        register_quant_backend(_BACKEND, quantizer_backend.round_values)
        for plugin in (huggingface, peft):  # nvidia-modelopt 0.47 has no public hook for these functions
            plugin._transposed_quantize = _round_stack
        huggingface._QuantGptOssExperts.quantize_weight = _quantize_weight
        QuantizedPackedExperts.quantizer = TensorQuantizer
        mtq.register(PackedExperts, QuantizedPackedExperts)
        # Linear layers are never quantized here, so ModelOpt must not replace them. In every forward pass, ModelOpt's
        # LoRA layer would add base and delta, to quantize the sum. It would also compute a gradient of the frozen base.
        for kind in (torch.nn.Linear, peft.LoraLinear):
            mtq.unregister(kind)


def insert(model: nn.Module, block_format: BlockFormat, calibrate: Calibrate) -> None:
    """Insert a fake quantizer for each expert weight, in place. Attach adapters first.

    Args:
        model: a gpt-oss model, with or without adapters.
        block_format: format of the quantizers, from FORMATS.
        calibrate: function that runs calibration data through the model. Only formats with calibrated scales use it.
    """
    register_backend()
    with hide_printed():
        mtq.quantize(base_of(model), _quant_cfg(block_format), forward_loop=calibrate)


def calibrate_importance(model: "PreTrainedModel", calibrate: Calibrate) -> None:
    """Measure the importance of input channels, so that scales minimize the output's error, not the weights' error.

    The importance of an input channel is the sum of the squares of its values during calibration. All experts in a
    stack share the same importance, because the hook does not know which expert a value goes to.
    """
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Hook:
        def add(module: TensorQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            squares = inputs[0].detach().float().flatten(0, -2).square().sum(dim=0)
            sums[name] = sums[name] + squares if name in sums else squares

        return add

    modules = dict(base_of(model).named_modules())
    weights = {name: module for name, module in find_enabled(base_of(model)) if name.endswith(WEIGHTS)}
    inputs = {name: modules[name.removesuffix(WEIGHTS) + INPUTS] for name in weights}
    hooks = [module.register_forward_hook(hook(name)) for name, module in inputs.items()]
    try:
        calibrate(model)
    finally:
        for each in hooks:
            each.remove()
    for name, module in weights.items():
        state_of(module).importance = sums[name].cpu()


def save_state(model: nn.Module, directory: Path) -> None:
    """Save the quantizers and the results of calibration.

    ModelOpt's state has only the shapes of the results, so the results are saved in another file. modelopt 0.47 orders
    the state's keys by Python's hash seed. They are sorted, so that another process writes the same bytes.
    """
    torch.save(_sort_keys(mto.modelopt_state(base_of(model))), directory / STATE_FILE)
    importance = {
        parameter_name(name).removesuffix(WEIGHTS): weight.cpu()
        for name, module in find_enabled(base_of(model))
        if (weight := state_of(module).importance) is not None
    }
    amax = {
        parameter_name(name): module.amax.cpu()
        for name, module in find_enabled(base_of(model))
        if name.endswith(INPUTS) and module.amax is not None
    }
    if importance or amax:
        torch.save({"importance": importance, "amax": amax}, directory / CALIBRATION_FILE)


def _sort_keys(state: Any) -> Any:
    """Sort the keys of all dictionaries in nested dictionaries, lists and tuples.

    Equal texts become one object, because pickle writes an object only once.
    """
    if isinstance(state, dict):
        return {_sort_keys(key): _sort_keys(state[key]) for key in sorted(state, key=repr)}
    if type(state) in (list, tuple):
        return type(state)(map(_sort_keys, state))
    return sys.intern(state) if type(state) is str else state


def restore(model: nn.Module, directory: Path, block_format: BlockFormat) -> None:
    """Restore the quantizers that are saved in `directory`, in place, and check them with `count`."""
    register_backend()
    with hide_printed():
        state = _load_state(directory / STATE_FILE)
        mto.restore_from_modelopt_state(base_of(model), state)
    calibration = load_calibration(directory)
    for full_name, module in find_enabled(base_of(model)):
        name = parameter_name(full_name)
        if name in calibration.amax:
            module.amax = calibration.amax[name]
        if name.removesuffix(WEIGHTS) in calibration.importance:
            state_of(module).importance = calibration.importance[name.removesuffix(WEIGHTS)]
    count(model, block_format)


def _load_state(path: Path) -> Any:
    """Load a state of ModelOpt, without running code.

    Raises:
        UserError: the file is damaged, or is a pickle that could run code.
    """
    # `weights_only` is given, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD changes its default.
    return read_plain(
        path,
        lambda: mto.load_modelopt_state(str(path), weights_only=True),
        "a readable state of ModelOpt",
        "Run the stage that made it again with overwrite=true.",
    )


def count(model: nn.Module, block_format: BlockFormat) -> int:
    """Check which quantizers are enabled, and return their number.

    The quantizers of expert weights (two per layer) must be enabled. With W4A4, the quantizers of the experts' inputs
    must be enabled too. No other quantizer may be enabled.

    Raises:
        CheckFailed: quantizers are missing, unexpected or not calibrated, or have the wrong format or scale rule.
    """
    base = base_of(model)
    kinds = _arguments(block_format)
    expected = {
        expert_parameter(layer, name) + kind: arguments
        for layer in range(base.config.num_hidden_layers)
        for name in EXPERT_WEIGHTS
        for kind, arguments in kinds.items()
    }
    found = {parameter_name(name): quantizer for name, quantizer in find_enabled(base)}
    wrong = sorted(expected.keys() ^ found.keys()) + [
        f"{name} ({quantizer.backend_extra_args})"
        for name, quantizer in found.items()
        if (name in expected and (quantizer.backend != _BACKEND or quantizer.backend_extra_args != expected[name]))
        or (name.endswith(INPUTS) and not (quantizer.amax is not None and bool(quantizer.amax > 0)))
    ]
    if wrong:
        raise CheckFailed(
            f"fake quantization: {len(found)} quantizers are enabled, expected {len(expected)} on the experts in"
            f" {block_format.name}, scale_rule={block_format.scale_rule}; wrong: {list_first(wrong, most=6)}"
        )
    return len(found)


def nvfp4_values(blocks: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Decode NVFP4 weights with ModelOpt, one expert at a time, because ModelOpt takes one tensor scale per call.

    Args:
        blocks: packed FP4 codes, (E, out, nb, 8) uint8. Each byte holds two elements, the even one in its low half.
        scales: block scales, (E, out, nb) float8_e4m3fn.
        tensor_scale: tensor scale of each expert, shape (E), float32.

    Returns:
        Decoded weights, (E, out, in) float32.
    """
    experts = []
    for codes, scale, unit in zip(blocks.flatten(-2), scales, tensor_scale, strict=True):
        tensor = NVFP4QTensor(torch.Size((codes.shape[0], 2 * codes.shape[1])), torch.float32, codes)
        experts.append(tensor.dequantize(scale=scale, double_scale=unit, block_sizes={-1: 2 * blocks.shape[-1]}))
    return torch.stack(experts)


def find_enabled(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Yield the enabled quantizers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


def _arguments(block_format: BlockFormat) -> dict[str, dict[str, object]]:
    """Return arguments for our backend, by the kind of quantizer. Only kinds that the format uses are included."""
    weights = {"format": block_format.name, "scale_rule": block_format.scale_rule, "is_input": False}
    inputs = {**weights, "scale_rule": INPUT_RULE, "is_input": True}
    return {WEIGHTS: weights, **({INPUTS: inputs} if block_format.quantizes_activations else {})}


def _quant_cfg(block_format: BlockFormat) -> dict[str, object]:
    """Make a configuration for ModelOpt. It quantizes only expert stacks, and it uses our backend.

    Otherwise the configuration is like ModelOpt's MXFP4_MLP_WEIGHT_ONLY_CFG.

    ModelOpt's own pattern (*mlp*weight_quantizer) would also enable quantizers that belong to the experts' adapters.
    Such quantizers never run. The algorithm `max` measures the largest magnitude of the inputs. Weights need no
    calibration, because our backend does not use their largest magnitude.
    """
    scale_bits = {ScaleType.e8m0: (8, 0), ScaleType.e4m3: (4, 3)}[block_format.scale_type]
    block_sizes = {-1: block_format.block_size, "type": "dynamic", "scale_bits": scale_bits}
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind, arguments in _arguments(block_format).items():
        settings = {"num_bits": (2, 1), "block_sizes": block_sizes, "backend": _BACKEND}
        rules.append({"quantizer_name": EXPERT_PATTERN + kind, "cfg": {**settings, "backend_extra_args": arguments}})
    return {"quant_cfg": rules, "algorithm": "max" if block_format.quantizes_activations else None}
