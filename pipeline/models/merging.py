"""Merge saved adapters into a model's weights, a few rows at a time.

The adapters are this program's, or another program's that saved them with PEFT (see `foreign_adapters`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.checkpoints.dtypes import dtype_name
from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.errors import UserError, list_first
from pipeline.models.adapted_names import parameter_name
from pipeline.models.adapters import factors_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ADAPTER = "default"
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of factors that are merged."""


class Merger:
    """Merges saved adapters tensor by tensor, so that the whole base model is never in memory.

    Experts are merged with `low_rank.merge`. In training, the quantizer of an adapted expert stack gets the same sum:
    ModelOpt 0.47 adds the wrapper's delta to the base, and then quantizes. SFT has no such sum for experts, because
    it multiplies by the factors of their adapters. Other layers are merged with PEFT's own `merge`, one layer at a
    time, in a model without weights.

    PEFT can save whole tensors beside the factors (`modules_to_save`, `bias`). They replace the base's tensors.
    """

    def __init__(self, directory: Path, model_config: "PretrainedConfig", dtype: torch.dtype) -> None:
        """Read the adapters.

        Args:
            directory: directory of the adapters.
            model_config: configuration of the base model.
            dtype: type of the base weights in training.

        Raises:
            UserError: the adapters do not fit the base model, or belong to parts of it that cannot be merged.
        """
        from transformers import AutoModelForCausalLM

        self._dtype, self._directory = dtype, directory
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
        config = PeftLoraConfig.from_pretrained(str(directory))
        config.base_model_name_or_path = None  # otherwise, PEFT warns that the base has another path
        try:
            adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
        except ValueError as error:  # a name in target_modules or target_parameters is unknown
            raise UserError(f"{directory / ADAPTER_CONFIG}: does not fit the base model ({error}).") from error
        weights = load_file(directory / ADAPTER_WEIGHTS)
        self._layers: dict[str, LoraLayer] = {}
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                self._layers[self._adapted_parameter(name, module)] = module
                self._take_factors(name, module, weights)
        self._replaced = self._take_whole(weights, shapes)

    def _adapted_parameter(self, name: str, layer: LoraLayer) -> str:
        """Return the name of the parameter that a layer adapts, in the plain model."""
        if isinstance(layer, ParamWrapper) and layer.parameter_name in EXPERT_WEIGHTS:
            return f"{parameter_name(name)}.{layer.parameter_name}"
        if isinstance(layer, Linear | Embedding):
            return f"{parameter_name(name)}.weight"
        part = layer.parameter_name if isinstance(layer, ParamWrapper) else type(layer).__name__
        raise UserError(
            f"{self._directory / ADAPTER_CONFIG}: adapts {parameter_name(name)} ({part}). This program merges adapters"
            " of linear layers, embeddings and expert weights only. Merge with PEFT (merge_and_unload, then"
            " save_pretrained), and give the result."
        )

    def _take_factors(self, name: str, layer: LoraLayer, weights: dict[str, Tensor]) -> None:
        """Move the factors of a layer from `weights` into the layer."""
        if isinstance(layer, Embedding):
            for side in ("lora_embedding_A", "lora_embedding_B"):
                held = getattr(layer, side)
                held[_ADAPTER] = self._fitting(f"{name}.{side}", held[_ADAPTER], weights)
            return
        for side in ("lora_A", "lora_B"):
            factor = getattr(cast(Any, layer), side)[_ADAPTER]
            factor.weight = self._fitting(f"{name}.{side}.weight", factor.weight, weights)

    def _fitting(self, key: str, hollow: Tensor, weights: dict[str, Tensor]) -> nn.Parameter:
        file = self._directory / ADAPTER_WEIGHTS
        if key not in weights:
            raise UserError(f"{file}: has no {key}, which {ADAPTER_CONFIG} and the base model ask for.")
        if weights[key].shape != hollow.shape:
            raise UserError(
                f"{file}: {key} has shape {list(weights[key].shape)}, but the base model needs {list(hollow.shape)}."
                " Set model.path to the model that the adapters were trained on."
            )
        if weights[key].dtype not in _TYPES:
            names = ", ".join(map(dtype_name, _TYPES))
            raise UserError(f"{file}: {key} has the type {dtype_name(weights[key].dtype)}. Save it in one of {names}.")
        return nn.Parameter(weights.pop(key), requires_grad=False)

    def _take_whole(self, weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return the tensors that replace the base's, by their names in the plain model."""
        whole = {parameter_name(key): tensor for key, tensor in weights.items()}
        file = self._directory / ADAPTER_WEIGHTS
        if unknown := sorted(whole.keys() - shapes.keys()):
            raise UserError(f"{file}: tensors belong to no adapter: {list_first(unknown)}.")
        for name, tensor in whole.items():
            if tensor.shape != shapes[name]:
                raise UserError(
                    f"{file}: {name} has shape {list(tensor.shape)}, but the base model has {list(shapes[name])}. A"
                    " vocabulary that was resized cannot be exported, because engines expect the base model's."
                )
        return whole

    def names(self) -> list[str]:
        """List the parameters of the plain model that the adapters change."""
        return [*self._layers, *self._replaced]

    def replaced(self) -> list[str]:
        """List the parameters of the plain model that whole tensors replace."""
        return [*self._replaced]

    def adapters(self) -> dict[str, tuple[int, float]]:
        """Return the rank and the scale of each adapter, by the name of its parameter in the plain model."""
        return {name: (layer.r[_ADAPTER], layer.scaling[_ADAPTER]) for name, layer in self._layers.items()}

    def __contains__(self, name: str) -> bool:
        """Return whether this parameter of the plain model has an adapter, or is replaced."""
        return name in self._layers or name in self._replaced

    @torch.no_grad()
    def merge(self, name: str, base: Tensor, first: int = 0) -> Tensor:
        """Return base + delta, in the type that training used.

        Args:
            name: name of the parameter in the plain model.
            base: base weights of the parameter. For an expert stack, this may be a part of the stack:
                consecutive experts (E, in, out).
            first: index of the first row (expert) in `base`.
        """
        if name in self._replaced:
            base = self._replaced[name][first : first + len(base)]
        if name not in self._layers:
            return base.to(self._dtype)
        layer = self._layers[name]
        if isinstance(layer, ParamWrapper):
            return factors_of(layer).merge(base.to(self._dtype), slice(first, first + len(base)))
        owner, attribute = layer.get_base_layer(), name.rpartition(".")[2]
        hollow = getattr(owner, attribute)
        setattr(owner, attribute, nn.Parameter(base.to(self._dtype, copy=True), requires_grad=False))
        layer.merge(adapter_names=[_ADAPTER])
        result = getattr(owner, attribute).data
        setattr(owner, attribute, hollow)
        layer.merged_adapters.clear()
        return result
