"""Makes models, and reads their weights under the names of the plain model."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.config import ExpertsImplementation, LoraConfig, Method, Precision, TrainConfig
from pipeline.models import adapters, expert_kernels, fake_quantizers
from pipeline.models.adapted_names import is_factor, parameter_name
from pipeline.numerics.formats import BlockFormat
from scripts.rounding_study.settings import BF16_PARTS, LORA, Settings
from scripts.rounding_study.task import VOCABULARY

Weights = dict[str, Tensor]
"""Name of the parameter in the plain model -> its value in float32."""

_WINDOW = 8
_BALANCE = 0.02  # weight of the loss that balances the experts, in pretraining


def make(settings: Settings) -> PreTrainedModel:
    """Make a model with random weights from torch's random numbers."""
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_local_experts=settings.experts,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden // 4,
        sliding_window=_WINDOW,
        router_aux_loss_coef=_BALANCE,
        attn_implementation="eager",
        pad_token_id=0,
    )
    model = GptOssForCausalLM(config)
    expert_kernels.use(model, ExpertsImplementation.auto, None, Precision.fp32)
    return model


def load(settings: Settings, weights: Weights) -> PreTrainedModel:
    """Make a model with these weights."""
    model = make(settings)
    model.load_state_dict(weights)
    return model


def read(model: torch.nn.Module) -> Weights:
    """Read the weights of a plain model, as copies."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_stack(name: str) -> bool:
    """Return whether a parameter of the plain model is a stack of expert weights."""
    return name.endswith(EXPERT_WEIGHTS)


def stacks(weights: Weights) -> list[str]:
    """List the names of the stacks of expert weights, layer by layer, gate_up before down."""
    return sorted((name for name in weights if is_stack(name)), key=lambda name: (name.split(".")[2], "down" in name))


def prepare(
    model: PreTrainedModel,
    settings: Settings,
    method: str,
    *,
    seed: int,
    block_format: BlockFormat | None = None,
    factors: Weights | None = None,
) -> PreTrainedModel:
    """Make a model ready for SFT or QAT: adapters, frozen experts, fake quantizers and the experts' kernel.

    Args:
        model: a plain model.
        settings: rank of the adapters.
        method: `full`, `lora` or `bf16_parts`.
        seed: seed of new adapters.
        block_format: format of QAT, or None for SFT.
        factors: adapters to continue with, from `read_factors`.
    """
    if method == LORA:
        lora = LoraConfig(rank=settings.rank, alpha=2 * settings.rank)
        train = TrainConfig(method=Method.lora, lora=lora, seed=seed)
        model = adapters.attach(model, train, "sft", is_factored=block_format is None)
        if factors is not None:
            model.load_state_dict(factors, strict=False)
    if method == BF16_PARTS:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_stack(name))
    if block_format is not None:
        with redirect_stdout(StringIO()):  # ModelOpt prints the number of quantizers
            fake_quantizers.insert(model, block_format, lambda _: None)
    expert_kernels.use(model, ExpertsImplementation.auto, block_format, Precision.fp32)
    return model


def read_factors(model: torch.nn.Module) -> Weights:
    """Read the factors of all adapters, as copies."""
    return {name: each.detach().clone() for name, each in model.named_parameters() if is_factor(name)}


def read_merged(model: Any) -> Weights:
    """Read the plain weights of a model, with its adapters merged. Attention is merged in place."""
    if not adapters.is_adapted(model):
        return read(model)
    merged = dict(adapters.expert_weights(model, slice(None)))
    adapters.merge_attention(model)
    plain = {parameter_name(name): each for name, each in model.named_parameters() if not is_factor(name)}
    return {name: each.detach().clone() for name, each in {**plain, **merged}.items()}
