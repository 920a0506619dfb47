"""Compare a model's predictions with a reference's: KL divergence, and agreement on the likeliest token.

There are two passes, so two models are never in memory together. `record` stores the reference's predictions: the TOP
likeliest tokens and their log-probabilities, for each supervised token of the validation batches. This takes 1 KiB
per supervised token. Storing all 201,088 tokens of the vocabulary would take 800 KiB. `score` compares another model
with the stored predictions. Logits exist only for a few tokens at a time (see `chunked_logits`).

All tokens outside the TOP are merged into one outcome. So the computed divergence is a lower bound of the true
divergence: merging outcomes cannot increase a divergence (data processing inequality; Cover and Thomas, Elements of
Information Theory, 2.8). The result is exact for a vocabulary of at most TOP tokens.

Legend: N = supervised tokens, n = supervised tokens in a chunk (at most `chunked_logits.CHUNK`), V = vocabulary size.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from pipeline.data.harmony import IGNORED
from pipeline.errors import at_most
from pipeline.evaluate.statistics import ratio_interval
from pipeline.evaluate.subject import Subject
from pipeline.models import chunked_logits
from pipeline.models.chunked_logits import States
from pipeline.models.references import ModelRef
from pipeline.runs.artifacts import digests_of
from pipeline.runs.console import progress, say, warn
from pipeline.runs.durable import sync_tree
from pipeline.runs.json_files import read_record, seal, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DIGESTS = "digests.json"
TOP = 128
BUCKETS = ((0, 32), (32, 128), (128, 512), (512, None))
"""Ranges of positions, counted from 0 over an example's supervised tokens. Divergence may grow with the position."""


def fingerprint(reference: ModelRef, dtype: torch.dtype, batches: Sequence[dict[str, Tensor]]) -> str:
    """Hash everything that determines the output of `record`: the reference, its dtype, and the padded batches."""
    digest = xxhash.xxh3_128(f"{reference.fingerprint}\0{dtype}\0{TOP}\0{chunked_logits.CHUNK}".encode())
    for batch in batches:
        for name in ("input_ids", "labels"):
            digest.update(f"{tuple(batch[name].shape)}".encode() + batch[name].numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def record(model: "PreTrainedModel", batches: Sequence[dict[str, Tensor]], directory: Path) -> None:
    """Store the reference's predictions, one file per batch. `directory` appears only when it is complete."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for i, batch in enumerate(progress(batches, what="predictions of the reference", unit="batch")):
        kept = list(chunked_logits.map_chunks(_likeliest, (_states(model, batch),)))
        log_probs, tokens = (torch.cat(parts).cpu() for parts in zip(*kept, strict=True))
        save_file({"log_probs": log_probs, "tokens": tokens.int()}, _file(unfinished, i))
    write_json(unfinished / _DIGESTS, seal(digests_of(unfinished)))
    sync_tree(unfinished)
    shutil.rmtree(directory, ignore_errors=True)  # predictions that are not sound
    unfinished.replace(directory)


def are_sound(directory: Path) -> bool:
    """Return whether stored predictions are complete and as they were written. Report damage.

    Predictions without digests, which older versions wrote, are not sound.
    """
    if not directory.is_dir():
        return False
    try:
        digests = read_record(directory / _DIGESTS)
    except FileNotFoundError:
        say("evaluate", f"{directory}: predictions without digests, from an older version of this program; made again")
        return False
    except ValueError as error:
        warn("evaluate", f"{directory / _DIGESTS}: damaged ({error}), so the predictions are made again")
        return False
    have = digests_of(directory)
    damaged = [name for name, digest in digests.items() if have.get(name) != digest]
    if damaged:
        warn("evaluate", f"{directory}: {', '.join(at_most(damaged))} damaged, so the predictions are made again")
    return not damaged


@torch.no_grad()
def score(subject: Subject) -> dict[str, float]:
    """Compute `kl_divergence` in nats and `top1_agreement`, as means over supervised tokens.

    The models agree at a position if the reference's likeliest token is also the model's likeliest token. If the
    model gives its highest probability to several tokens, each of them counts as its likeliest token.

    Returns:
        Both figures. If there are at least two examples, each figure has a 95 % interval: <figure>_low and
        <figure>_high. Each figure is also given for ranges of positions, as <figure>/<first>-<last>. A range without
        tokens is left out. The result is empty without recorded predictions.
    """
    if subject.ref is None or subject.model is None or subject.reference_predictions is None:
        return {}
    per_token, example = [], 0
    for i, batch in enumerate(progress(subject.batches, what=f"predictions of {subject.ref.name}", unit="batch")):
        kept = load_file(_file(subject.reference_predictions, i), device=str(subject.model.device))
        states = _states(subject.model, batch)
        found = torch.cat(list(chunked_logits.map_chunks(_compare, (states,), kept["log_probs"], kept["tokens"])))
        per_token.append(torch.cat([found.cpu(), _places(batch, example)], dim=1))
        example += len(batch["labels"])
    return _figures(torch.cat(per_token))


def _states(model: "PreTrainedModel", batch: dict[str, Tensor]) -> States:
    """Run the model up to its head. Return the states that predict supervised tokens, one row after the other."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    supervised = functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    return chunked_logits.compute_states(model, inputs, chunked_logits.find_positions(supervised.to(model.device)))


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the likeliest tokens of logits (n, V).

    Returns:
        The log-probabilities that `_merge` returns, and the tokens in descending order of probability. The shape of
        the tokens is (n, TOP).
    """
    tokens = logits.topk(min(TOP, logits.shape[1])).indices
    return _merge(logits.log_softmax(-1), tokens), tokens


def _merge(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Merge all tokens except `tokens` into one outcome.

    Args:
        log_probs: log-probabilities of the whole vocabulary, (n, V).
        tokens: the tokens to keep, (n, TOP).

    Returns:
        Log-probabilities, (n, TOP + 1). The last column is the merged outcome, absent if no tokens remain.
    """
    chosen = log_probs.gather(1, tokens)
    if log_probs.shape[1] == tokens.shape[1]:
        return chosen
    others = log_probs.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([chosen, others], dim=1)


def _compare(logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """Compare the model's logits (n, V) with the reference's stored predictions.

    Returns:
        For each token, its divergence and its agreement (1 or 0). The shape is (n, 2), and the type is float64.
    """
    own = logits.log_softmax(-1)
    model = _merge(own, tokens.long())
    divergence = functional.kl_div(model.double(), reference.double(), reduction="none", log_target=True).sum(1)
    agrees = model[:, 0] >= own.amax(1)
    return torch.stack([divergence, agrees.double()], dim=1)


def _places(batch: dict[str, Tensor], first_example: int) -> Tensor:
    """Locate the supervised tokens of a batch, in the order of `_states`.

    Returns:
        (tokens, 2) float64. Each row has the token's position and the index of the token's example. The position counts
        only the supervised tokens of the example, from 0.
    """
    supervised = batch["labels"][:, 1:] != IGNORED
    position = (supervised.cumsum(1) - 1)[supervised]
    example = supervised.nonzero()[:, 0] + first_example
    return torch.stack([position, example], dim=1).double()


def _figures(per_token: Tensor) -> dict[str, float]:
    """Compute the figures from `per_token`, which has the shape (N, 4).

    The columns are the divergence, the agreement, the position and the example of each token.
    """
    divergence, agrees, position, example = per_token.unbind(1)
    found: dict[str, float] = {}
    for name, values in (("kl_divergence", divergence), ("top1_agreement", agrees)):
        found |= {name: float(values.mean()), **_interval(name, values, example)}
        for first, end in BUCKETS:
            part = (position >= first) & (position < (end or torch.inf))
            if part.any():
                found[f"{name}/{first}-{end - 1 if end else ''}"] = float(values[part].mean())
    return found


def _interval(name: str, values: Tensor, example: Tensor) -> dict[str, float]:
    """Compute the interval by resampling whole examples, because the tokens of one example are correlated."""
    numbers, example = example.unique(return_inverse=True)
    if len(numbers) < 2:
        return {}
    totals = torch.zeros(len(numbers), 2, dtype=torch.float64)
    totals.index_add_(0, example, torch.stack([values, torch.ones_like(values)], dim=1))
    bounds = ratio_interval(*totals.T.numpy())
    return {f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def _file(directory: Path, batch: int) -> Path:
    return directory / f"{batch:06d}.safetensors"
