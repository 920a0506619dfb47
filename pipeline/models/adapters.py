"""Attach LoRA adapters to attention layers and expert stacks, and load saved adapters.

Only this module and `merging` import peft. This module holds its patches.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.checkpoints.gpt_oss import ATTENTION_PROJECTIONS, EXPERT_WEIGHTS, attention_projection, expert_parameter
from pipeline.checkpoints.side_files import ADAPTER_WEIGHTS
from pipeline.config import LoraConfig, LoraTarget, TrainConfig, adapted_layers
from pipeline.config.training import layers_problem
from pipeline.errors import CheckFailed, UserError
from pipeline.models import sharding
from pipeline.models.adapted_names import parameter_name
from pipeline.models.expert_products import Factors
from pipeline.models.packed_experts import PackedExperts, is_packed
from pipeline.numerics import low_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"
_QUANTIZER = "_weight_quantizer"


def factors_of(wrapper: ParamWrapper, adapter_name: str = _ADAPTER) -> Factors:
    """Return the factors of an expert stack's adapter as views of PEFT's matrices.

    PEFT 0.21 keeps the factors of all experts in two matrices. The shape of A is (experts * rank, in). The shape of B
    is (out, rank * experts).
    """
    a, b = _weight(wrapper.lora_A[adapter_name]), _weight(wrapper.lora_B[adapter_name])
    count = wrapper.num_experts
    return Factors(
        a.reshape(count, -1, a.shape[1]).transpose(1, 2),
        b.reshape(b.shape[0], -1, count).permute(2, 1, 0),
        wrapper.scaling[adapter_name],
    )


def _compute_delta(wrapper: ParamWrapper, adapter_name: str, *_: object, **__: object) -> Tensor:
    """Compute the delta of an expert stack, in the type of the stack.

    This replaces a method of PEFT 0.21. The exact bits of that method's result depend on the device and on the number
    of experts. Under autocast, that method computes in BF16. An export merges a few experts at a time, on a CPU. With
    PEFT's method, the exported weights would therefore differ from the weights in training.
    """
    factors = factors_of(wrapper, adapter_name)
    return low_rank.delta(wrapper.get_param(), factors.a, factors.b, factors.scaling)


ParamWrapper.get_delta_weight = _compute_delta  # type: ignore[assignment, method-assign]


class _FactoredWrapper(ParamWrapper):
    """PEFT's adapter of an expert stack. Its forward pass does not compute base + delta.

    The factors are passed on to the experts' forward function, which multiplies by them (`expert_products`).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Call the experts with the factors of the active adapter. If it is disabled or merged, do as PEFT does."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        factors = {**kwargs.pop("factors", {}), self.parameter_name: factors_of(self, adapter)}
        return self.base_layer(x, *args, factors=factors, **kwargs)


class _PackedWrapper(_FactoredWrapper):
    """PEFT's adapter of a packed expert stack. Its factors have the same shapes as for the decoded stack."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts = cast(PackedExperts, self.get_base_layer())
        self.num_experts, self._param_ndim = experts.num_experts, 3
        return experts.features[self.parameter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Round the initial values of the factors to the type of the experts, as PEFT does for decoded experts."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for factor in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if not _weight(factor).is_meta:
                factor.to(cast(PackedExperts, self.get_base_layer()).dtype).to(torch.float32)


for _wrapper in (_FactoredWrapper, _PackedWrapper):
    _wrapper.__name__ = ParamWrapper.__name__  # peft 0.21 recognizes a wrapper by the name of its class


def attach(
    model: "PreTrainedModel", train: TrainConfig, section: str, *, is_factored: bool = False
) -> "PreTrainedModel":
    """Attach new adapters to the configured parts of the configured layers, and freeze everything else.

    The result is a PeftModel, which also has the attributes of the wrapped model.

    Args:
        model: a gpt-oss model without adapters or quantizers.
        train: settings of the stage. `lora` sets the rank and place of the adapters, and `seed` sets their initial
            values.
        section: name of `train` in the configuration, for messages.
        is_factored: whether the forward pass multiplies by the factors of the experts' adapters. Otherwise it
            multiplies by base + delta. This must be false if quantizers will be inserted, because quantizers round
            base + delta. Call `expert_kernels.use` afterwards.

    Raises:
        UserError: the configuration names a layer that the model does not have.
        CheckFailed: the model already has quantizers. Quantizers inserted before the adapters would never run.
    """
    if any(name.endswith(_QUANTIZER) for name, _ in model.named_modules()):
        raise CheckFailed("adapters: the model is quantized already. Attach adapters before quantizers are inserted.")
    config = _peft_config(train.lora, model.config.num_hidden_layers, section)
    _register_wrapper(config, model, is_factored)
    torch.manual_seed(train.seed)
    return cast("PreTrainedModel", get_peft_model(model, config))


def _register_wrapper(config: PeftLoraConfig, model: "PreTrainedModel", is_factored: bool) -> None:
    if is_packed(model):
        _register(config, PackedExperts, _PackedWrapper)
    elif is_factored:
        _register(config, type(_experts_of(model)), _FactoredWrapper)


def _register(config: PeftLoraConfig, experts: type[nn.Module], wrapper: type[ParamWrapper]) -> None:
    """Register the wrapper for a kind of experts.

    peft 0.21 calls this method experimental, but documents it as the way to add a kind of adapter.
    """
    config._register_custom_module({experts: wrapper})


def _experts_of(model: "PreTrainedModel") -> nn.Module:
    return model.get_submodule(expert_parameter(0, EXPERT_WEIGHTS[0]).rpartition(".")[0])


def _peft_config(lora: LoraConfig, count: int, section: str) -> PeftLoraConfig:
    layers = adapted_layers(lora, count)
    if (problem := layers_problem(lora, count, section)) is not None:
        raise UserError(problem)
    attention = LoraTarget.attention in lora.targets
    experts = LoraTarget.experts in lora.targets
    return PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,  # PEFT does not support dropout for `target_parameters`
        bias="none",
        target_modules=[attention_projection(i, name) for i in layers for name in ATTENTION_PROJECTIONS]
        if attention
        else [],
        target_parameters=[expert_parameter(i, name) for i in layers for name in EXPERT_WEIGHTS] if experts else None,
        task_type="CAUSAL_LM",
    )


def load(model: "PreTrainedModel", directory: Path, trainable: bool, *, is_factored: bool = False) -> "PreTrainedModel":
    """Attach the adapters that are saved in `directory`. The result is a PeftModel. For `is_factored`, see `attach`."""
    config = PeftLoraConfig.from_pretrained(str(directory))
    _register_wrapper(config, model, is_factored)
    config.inference_mode = not trainable
    # By default, PEFT 0.21 reads the file to the first GPU in every process, even if the model is on the CPU.
    model_with_adapters = PeftModel.from_pretrained(
        model, str(directory), is_trainable=trainable, torch_device="cpu", config=config
    )
    return cast("PreTrainedModel", model_with_adapters)


def is_factored(model: nn.Module) -> bool:
    """Return whether the forward pass multiplies by the factors of the experts' adapters (see `attach`)."""
    return any(isinstance(module, _FactoredWrapper) for module in model.modules())


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model has adapters."""
    return isinstance(model, PeftModel)


def base_of(model: nn.Module) -> "PreTrainedModel":
    """Return the model without PEFT's wrapper. Adapters stay attached to its layers."""
    return cast("PreTrainedModel", model.get_base_model() if isinstance(model, PeftModel) else model)


def merge_attention(model: nn.Module) -> None:
    """Merge the adapters of attention layers in place, with PEFT's own merge. Adapters of experts are not merged."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.merge()


@torch.no_grad()
def expert_weights(model: nn.Module, experts: slice) -> Iterator[tuple[str, Tensor]]:
    """For each trained stack, yield its name and some of its experts with adapters merged.

    The shape of the experts is (E, in, out). `experts` is the slice of the stack's experts to yield. If a stack is
    sharded, only the main process yields experts. It holds the first experts of the stack, and can yield only these. A
    stack whose parameter is empty is skipped: ZeRO-3 empties parameters between forward passes. This is a collective
    call.
    """
    adapted = {
        f"{parameter_name(name)}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }
    for full_name, parameter in model.named_parameters():
        name = parameter_name(full_name)
        if not name.endswith(EXPERT_WEIGHTS) or not (parameter.requires_grad or name in adapted):
            continue
        weights = _read_experts(model, full_name, parameter, experts)
        if name in adapted:
            with _whole_factors(adapted[name]) as factors:
                weights = None if weights is None else factors.merge(weights, experts)
        if weights is not None:
            yield name, weights


def _read_experts(model: nn.Module, name: str, parameter: Tensor, experts: slice) -> Tensor | None:
    """Read some experts of a parameter, decoded. Return None if this process has none of them."""
    stack = sharding.first_part(parameter)
    if not stack.numel():
        return None
    owner = model.get_submodule(name.rpartition(".")[0])
    if not isinstance(owner, PackedExperts):
        return stack[experts]
    kind = name.rpartition(".")[2]
    scales = sharding.first_part(owner.scales(kind))
    return owner.decode_packed(kind, stack[experts], scales[experts])


@contextmanager
def _whole_factors(wrapper: ParamWrapper) -> Iterator[Factors]:
    """Gather the factors of an adapter inside the block. This is a collective call if they are sharded."""
    with ExitStack() as stack:
        for factor in (*wrapper.lora_A.values(), *wrapper.lora_B.values()):
            whole = stack.enter_context(sharding.gather(_weight(factor)))
            stack.callback(setattr, factor, "weight", _weight(factor))
            factor.weight = torch.nn.Parameter(whole.data, requires_grad=False)
        yield factors_of(wrapper)


class SavedAdapters:
    """Saved adapters that can replace a model's own adapters during some forward passes.

    They stay outside of the model. So the trainer does not see them, and does not save or shard them.
    """

    def __init__(self, directory: Path | None) -> None:
        """Read the adapters in `directory`. If it is None, the model will compute with its base alone."""
        self._factors = None if directory is None else load_file(directory / ADAPTER_WEIGHTS)

    @contextmanager
    def replace_own(self, model: nn.Module) -> Iterator[None]:
        """Replace the adapters of a model inside the block, for forward passes without gradients.

        A layer with plain weights then computes with base + delta. Merging the saved adapters into a plain model gives
        the same bits. Packed experts use the factors instead, unless their quantizers are on.

        Hooks replace the parameters of a layer only while the layer runs, because FSDP2 and ZeRO-3 gather the
        parameters only then.
        """
        (peft_model,) = (module for module in model.modules() if isinstance(module, PeftModel))
        with ExitStack() as hooks:
            for name, layer in peft_model.named_modules():
                if isinstance(layer, LoraLayer):
                    for hook in self._hook(name, layer):
                        hooks.callback(hook.remove)
            yield

    def _hook(self, name: str, layer: LoraLayer) -> tuple[RemovableHandle, RemovableHandle]:
        replaced = ExitStack()

        def enter(*_: object) -> None:
            replaced.enter_context(_without_own_adapter(layer, self._read(name, layer)))

        def leave(*_: object) -> None:
            replaced.close()

        module = cast(nn.Module, layer)
        return module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)

    def _read(self, name: str, layer: LoraLayer) -> list[Tensor] | None:
        """Return the saved factors A and B of a layer. They are copied to the layer's device only once."""
        if self._factors is None:
            return None
        keys = [f"{name}.{side}.weight" for side in ("lora_A", "lora_B")]
        device = _weight(layer.lora_A[_ADAPTER]).device
        self._factors |= {key: self._factors[key].to(device) for key in keys}
        return [self._factors[key] for key in keys]


@contextmanager
def _without_own_adapter(layer: LoraLayer, factors: Sequence[Tensor] | None) -> Iterator[None]:
    """Inside the block, replace the factors of a layer. If `factors` is None, the layer computes without an adapter.

    PEFT's method that disables and enables adapters also freezes and unfreezes their parameters. The layer's own
    parameters are replaced inside the block, so the method does not reach them.
    """
    own = layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
    with ExitStack() as stack:
        for module, factor in zip(own, factors or [_weight(each).detach() for each in own], strict=True):
            stack.enter_context(_parameter_replaced(module, factor))
        if isinstance(layer, Linear) and factors is not None:
            base = layer.get_base_layer()
            merged = (_weight(base) + layer.get_delta_weight(_ADAPTER)).to(_weight(base).dtype)
            stack.enter_context(_parameter_replaced(base, merged))
        if isinstance(layer, Linear) or factors is None:
            layer.enable_adapters(False)
            stack.callback(layer.enable_adapters, True)
        yield


@contextmanager
def _parameter_replaced(module: nn.Module, weight: Tensor) -> Iterator[None]:
    own, module.weight = module.weight, nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        module.weight = own


def _weight(factor: nn.Module) -> Tensor:
    return cast(Tensor, factor.weight)
