"""Rounds the experts of a fine-tuned model by each method, with the program's codec, and keeps the account.

Legend: E = experts, in = input dimension, out = output dimension, nb = blocks per row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.export.account import Account, Scales
from pipeline.numerics.codec import choose_scales, encode, fake_quantize, tensor_scale
from pipeline.numerics.comparison import unequal_blocks
from pipeline.numerics.convert import mxfp4_to_nvfp4
from pipeline.numerics.formats import E8M0_LARGEST, FORMATS, MXFP4, BlockFormat
from pipeline.numerics.gptq import Hessians, round_gptq
from pipeline.numerics.stochastic import Noise, round_to_scales
from scripts.rounding_study import models
from scripts.rounding_study.models import Weights
from scripts.rounding_study.settings import Settings
from scripts.rounding_study.task import Rows

NEAREST, STOCHASTIC, GPTQ = "nearest", "stochastic", "gptq"
BASE = "base"
"""Name of the rule that keeps the base's own scales."""

RULES = {"mxfp4": "ceil", "nvfp4": "mse"}
"""Format -> rule of the forward pass and of the export. They are the program's defaults."""


def block_format(name: str) -> BlockFormat:
    """Return a format with the program's default rule."""
    return FORMATS[name].with_rule(RULES[name])


@dataclass(frozen=True)
class Base:
    """A base model whose experts are values of MXFP4.

    Attributes:
        weights: all weights. Those of the experts are decoded.
        stored: stack -> its MXFP4 blocks and scales.
    """

    weights: Weights
    stored: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, weights: Weights, rule: str) -> "Base":
        """Round the experts of a model."""
        rounded, stored = dict(weights), {}
        for name in models.stacks(weights):
            turned, near = weights[name].transpose(1, 2), torch.empty_like(weights[name])
            stored[name] = encode(turned, MXFP4.with_rule(rule), rounded=near.transpose(1, 2))
            rounded[name] = near
        return cls(rounded, stored)

    def scales(self, name: str, form: BlockFormat) -> Scales:
        """Return the stack's own scales in a format."""
        blocks, stored = self.stored[name]
        if form.stores_like(MXFP4):
            return stored.clamp(max=E8M0_LARGEST), None
        converted = mxfp4_to_nvfp4(blocks, stored)
        return converted.scales, converted.tensor_scale


@dataclass(frozen=True)
class Rounding:
    """How to round.

    Attributes:
        form: format with the rule of the forward pass.
        method: `nearest`, `stochastic` or `gptq`.
        rule: rule that chooses the scales, or `base`.
        seed: seed of stochastic rounding.
    """

    form: BlockFormat
    method: str
    rule: str
    seed: int

    def scales(self, name: str, values: Tensor, base: Base) -> Scales:
        """Return the scales of (E, out, in) weights."""
        if self.rule == BASE:
            return base.scales(name, self.form)
        unit = tensor_scale(values, self.form)
        return choose_scales(values, self.form.with_rule(self.rule), unit), unit


def round_experts(
    tuned: Weights, base: Base, rounding: Rounding, settings: Settings, calibration: Rows
) -> tuple[Weights, dict[str, float | None]]:
    """Round the experts of a model. Return the rounded model, and the figures of the account.

    Besides the figures of the account, `too_few_tokens` counts the stacks' experts that GPTQ left to another method.
    """
    account, rounded, too_few = Account(), dict(tuned), 0
    if rounding.method == GPTQ:
        found, too_few = round_by_gptq(tuned, base, rounding, settings, calibration)
        rounded.update(found)
    for name in models.stacks(tuned):
        turned = tuned[name].transpose(1, 2)
        scales = rounding.scales(name, turned, base)
        noise = Noise.of(rounding.seed, name) if rounding.method == STOCHASTIC else None
        made = round_to_scales(turned, rounding.form, *scales, noise=noise)
        if rounding.method != GPTQ:
            rounded[name] = made.values.transpose(1, 2)
        adjusted = _settle(rounded, name, rounding.form)
        account.add(
            tuned[name],
            rounded[name],
            base=base.weights[name],
            rounded_base=base.weights[name],
            scales=(scales, base.scales(name, rounding.form)),
            block_format=rounding.form,
            clipped=made.clipped,
            adjusted_blocks=adjusted,
        )
    return rounded, {**account.figures(), "too_few_tokens": too_few}


def drop_change(tuned: Weights, base: Base) -> Weights:
    """Return the fine-tuned model with the experts of the base."""
    return {**tuned, **{name: base.weights[name] for name in models.stacks(tuned)}}


def _settle(rounded: Weights, name: str, form: BlockFormat) -> int:
    """Round a stack by the format's rule, as the forward pass does. Return the number of blocks that changed."""
    before = rounded[name]
    rounded[name] = fake_quantize(before.transpose(1, 2), form).transpose(1, 2).contiguous()
    return int(unequal_blocks(rounded[name], before, form).sum())


@torch.no_grad()
def round_by_gptq(
    tuned: Weights, base: Base, rounding: Rounding, settings: Settings, calibration: Rows
) -> tuple[Weights, int]:
    """Round the experts with GPTQ, layer by layer, on hidden states that come from rounded layers.

    Experts with too few tokens are rounded stochastically to the base's scales. Return the rounded stacks, and the
    number of these experts.
    """
    model = models.load(settings, tuned)
    found: Weights = {}
    too_few = 0
    for layer in range(settings.layers):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        tokens = _tokens_of_experts(model, experts, calibration)
        for kind in ("gate_up_proj", "down_proj"):
            name = f"model.layers.{layer}.mlp.experts.{kind}"
            parameter = experts.get_parameter(kind)
            hessians = Hessians(settings.experts, parameter.shape[1])
            for expert, states in enumerate(tokens):
                hessians.add(expert, states)
            found[name] = _round_stack(name, parameter, hessians, base, rounding, settings)
            too_few += len(hessians.with_too_few_tokens(settings.tokens_per_input))
            parameter.copy_(found[name])
            if kind == "gate_up_proj":
                tokens = [
                    experts._apply_gate(states @ weight + bias)
                    for states, weight, bias in zip(tokens, parameter, experts.gate_up_proj_bias, strict=True)
                ]
    return found, too_few


def _round_stack(
    name: str, weights: Tensor, hessians: Hessians, base: Base, rounding: Rounding, settings: Settings
) -> Tensor:
    turned = weights.transpose(1, 2)
    stored, unit = rounding.scales(name, turned, base)
    few = hessians.with_too_few_tokens(settings.tokens_per_input)
    means = hessians.means.clone()
    means[few] = torch.eye(means.shape[-1])
    made = round_gptq(turned, means, rounding.form, stored=stored, tensor_scale=unit, experts_at_once=settings.experts)
    if few:
        scales = base.scales(name, rounding.form)
        made[few] = round_to_scales(turned, rounding.form, *scales, noise=Noise.of(rounding.seed, name)).values[few]
    return made.transpose(1, 2)


def _tokens_of_experts(model: torch.nn.Module, experts: torch.nn.Module, rows: Rows) -> list[Tensor]:
    """Return the inputs of each expert of a layer, (tokens, in)."""
    parts: list[list[Tensor]] = [[] for _ in range(experts.num_experts)]

    def take(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states, chosen = inputs[:2]
        for expert, part in enumerate(parts):
            part.append(states[(chosen == expert).any(dim=-1)])

    hook = experts.register_forward_pre_hook(take)
    for data in rows.batches(256):
        model(data["input_ids"], attention_mask=data["attention_mask"], use_cache=False)
    hook.remove()
    return [torch.cat(part) for part in parts]
