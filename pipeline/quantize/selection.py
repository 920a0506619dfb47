"""Measures how far several roundings of a model are from the trained model, and chooses the nearest one.

The measure is the KL divergence of the next-token predictions on validation examples. The error of weights or of a
layer's output would rank the methods wrongly. All roundings go through a layer together, so one layer is in memory.

Legend: N = tokens of all examples, H = hidden size, V = vocabulary size, n = tokens of a chunk.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import ExpertProjection
from pipeline.config import QuantizeConfig, RoundingMethod, RoundingScales
from pipeline.data.harmony import IGNORED
from pipeline.errors import CheckFailed
from pipeline.models.layerwise import Layer, Routed, Walk
from pipeline.numerics.formats import BlockFormat
from pipeline.quantize.rounding import Job, round_rows
from pipeline.runs.artifacts import CHECKPOINTS_DIR
from pipeline.runs.console import progress, say, warn
from pipeline.runs.json_files import read_record, seal, write_json
from pipeline.runs.tracking import log_metrics

_MEASURED = "auto.json"


class Candidate(TypedDict):
    """A rounding that was tried. The divergence is in nats per supervised token of the validation examples."""

    method: str
    scales: str
    kl_divergence: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """KL(trained model || rounded model) in nats, a mean over the supervised tokens.

    Attributes:
        kl_divergence: the mean.
        standard_error: its standard error. Examples are independent of each other, but their tokens are not.
    """

    kl_divergence: float
    standard_error: float


def candidates(asked: QuantizeConfig, block_format: BlockFormat, *, has_own_scales: bool) -> list[QuantizeConfig]:
    """List the roundings that `quantize.method=auto` tries. Each is a section `quantize` that asks for it directly.

    Args:
        asked: section `quantize` of the configuration. If it has `scales`, every method is tried with these scales.
        block_format: the format. GPTQ is not tried if the format quantizes activations.
        has_own_scales: whether the base has scales of its own.
    """
    methods = [RoundingMethod.stochastic, *([] if block_format.quantizes_activations else [RoundingMethod.gptq])]
    rule = RoundingScales[block_format.scale_rule]
    with_scales = [rule, *([RoundingScales.base] if has_own_scales else [])] if asked.scales is None else [asked.scales]
    nearest = [replace(asked, method=RoundingMethod.nearest, scales=each) for each in with_scales]
    return [*nearest, *(replace(asked, method=method) for method in methods)]


def choose(
    tried: Sequence[QuantizeConfig], jobs: Sequence[Job], found: Callable[[], list[Divergence]], directory: Path
) -> tuple[int, list[Candidate]]:
    """Return the index of the rounding with the lowest divergence, and the figures of all. Tell and log them.

    Args:
        tried: the roundings.
        jobs: the job of each rounding.
        found: function that measures the divergences. It is not called if an interrupted run has measured them.
        directory: directory of the stage.

    Raises:
        CheckFailed: a divergence is not finite.
    """
    path = directory / CHECKPOINTS_DIR / _MEASURED
    figures = _read_measured(path)
    if not figures:
        figures = [
            Candidate(
                method=asked.method.name,
                scales=job.scales_name,
                kl_divergence=divergence.kl_divergence,
                standard_error=divergence.standard_error,
            )
            for asked, job, divergence in zip(tried, jobs, found(), strict=True)
        ]
        _raise_if_not_finite(figures)
        path.parent.mkdir(exist_ok=True)
        write_json(path, seal({"candidates": figures}))
    for number, each in enumerate(figures):
        log_metrics(directory, {"candidate": number, **each})
    best = min(range(len(figures)), key=lambda i: figures[i]["kl_divergence"])
    for i, each in enumerate(figures):
        say(
            "quantize",
            f"{each['method']:<10} scales={each['scales']:<5} divergence from the unrounded model"
            f" {each['kl_divergence']:.3g} ± {each['standard_error']:.1g}{', chosen' if i == best else ''}",
        )
    return best, figures


def _read_measured(path: Path) -> list[Candidate]:
    """Return the figures that an interrupted run has measured. Without usable figures, the list is empty."""
    try:
        found: list[Candidate] = read_record(path)["candidates"]
        return found
    except FileNotFoundError:
        return []
    except (ValueError, KeyError) as error:
        warn("quantize", f"{path}: damaged, so the roundings are compared again ({error!r})")
        return []


def _raise_if_not_finite(figures: Sequence[Candidate]) -> None:
    bad = [each for each in figures if not math.isfinite(each["kl_divergence"])]
    if bad:
        raise CheckFailed(
            f"quantize.method=auto: the divergence of {bad[0]['method']} rounding is {bad[0]['kl_divergence']}."
            " The model's predictions on the validation examples are not finite. Training went wrong."
        )


@torch.no_grad()
def measure(jobs: Sequence[Job], batches: Sequence[Mapping[str, Tensor]], attention: str) -> list[Divergence]:
    """Measure the divergence of each job's rounded model from the trained model. All jobs round the same model.

    Args:
        jobs: the roundings.
        batches: validation examples, as batches of `losses.batches`.
        attention: attention implementation of transformers.
    """
    walk = Walk(jobs[0].weights, batches, jobs[0].device, attention)
    states = [walk.embed()] * (1 + len(jobs))
    for number in progress(range(walk.layers), what="measuring", unit="layer"):
        with walk.layer(number) as layer:
            states = _run_layer(jobs, number, layer, states)
    supervised, examples = (each.to(walk.device) for each in _supervised(batches))
    with walk.head() as (norm, head):
        hidden = [norm(each[supervised]) for each in states]
        found = [_divergences(hidden[0], each, head) for each in hidden[1:]]
    return [_summarize(each.double(), examples) for each in found]


def _run_layer(jobs: Sequence[Job], number: int, layer: Layer, states: Sequence[Tensor]) -> list[Tensor]:
    """Run a layer for the trained model and for each job. Shapes: (N, H) to (N, H)."""
    gate_up, down = (each for each in jobs[0].projections if each.layer == number)
    routed = [layer.attend(each) for each in states]
    outputs = [torch.zeros_like(each.residual) for each in routed]
    for expert in range(gate_up.experts):
        if any(len(each.tokens[expert]) for each in routed):
            weights = [_weights(jobs, projection, expert) for projection in (gate_up, down)]
            for each, output, wide, narrow in zip(routed, outputs, *weights, strict=True):
                _add_output(layer, each, expert, (wide, narrow), output)
    return [each.residual + output for each, output in zip(routed, outputs, strict=True)]


def _weights(jobs: Sequence[Job], projection: ExpertProjection, expert: int) -> list[Tensor]:
    """Return the weights of an expert, (in, out), in the trained model and as each job rounds them."""
    rows, weights = slice(expert, expert + 1), jobs[0].weights
    trained = weights.read_trained(projection.name, rows, device=jobs[0].device)
    return [trained[0], *(round_rows(job, projection, rows, trained)[0] for job in jobs)]


def _add_output(layer: Layer, routed: Routed, expert: int, weights: tuple[Tensor, Tensor], output: Tensor) -> None:
    for tokens, shares in routed.parts(expert):
        gated = layer.gate_up(expert, routed.inputs[tokens], weights[0])
        output.index_add_(0, tokens, layer.down(expert, gated, weights[1]) * shares.unsqueeze(-1))


def _supervised(batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Find the tokens whose next token is supervised: their indices among all tokens, and their examples."""
    masks, examples, first = [], [], 0
    for batch in batches:
        is_token, labels = batch["attention_mask"].bool(), batch["labels"]
        followed = torch.zeros_like(is_token)
        followed[:, :-1] = labels[:, 1:] != IGNORED
        masks.append(followed[is_token])
        examples.append((first + torch.arange(len(labels))).unsqueeze(1).expand_as(labels)[is_token])
        first += len(labels)
    chosen = torch.cat(masks).nonzero().squeeze(1)
    return chosen, torch.cat(examples)[chosen]


def _divergences(trained: Tensor, rounded: Tensor, head: Tensor) -> Tensor:
    """Compute KL(trained || rounded) of each token from the states before the head, (tokens, H)."""
    from pipeline.models import chunked_logits
    from pipeline.models.chunked_logits import States

    models = (States(trained, head), States(rounded, head))
    return torch.cat(list(chunked_logits.map_chunks(_divergence, models)))


def _divergence(trained: Tensor, rounded: Tensor) -> Tensor:
    """Compute KL(trained || rounded) of each row of logits, (n, V)."""
    expected, found = trained.log_softmax(-1), rounded.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1)


def _summarize(values: Tensor, examples: Tensor) -> Divergence:
    """Compute the mean over tokens, and its standard error from the sums of the examples (ratio estimator)."""
    _, groups = examples.unique(return_inverse=True)
    count = int(groups.max()) + 1
    sums = values.new_zeros(count).index_add_(0, groups, values)
    tokens = values.new_zeros(count).index_add_(0, groups, torch.ones_like(values))
    mean = values.mean()
    rest = (sums - mean * tokens).square().sum() * count / max(1, count - 1)
    return Divergence(float(mean), float(rest.sqrt() / len(values)))
