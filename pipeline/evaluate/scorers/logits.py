"""How far a model's predictions are from the reference's: divergence, and whether both would say the same token.

Two passes, so that two models are never in memory together: `record` keeps of the reference, for each supervised token
of the validation batches, its likeliest TOP tokens and their log-probabilities, 1 KiB a token in place of 800 KiB for a
vocabulary of 201,088; `score` holds a model against them. Logits exist for a few tokens at a time (see `head`).

All other tokens of the vocabulary count as one, so the divergence is a lower bound, which merging outcomes can only
lower (the data processing inequality; Cover and Thomas, Elements of Information Theory, 2.8). It is exact where the
vocabulary has no more than TOP tokens.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from pipeline.data.harmony import IGNORED
from pipeline.evaluate.statistics import ratio_interval
from pipeline.evaluate.subject import Subject
from pipeline.models import chunked_logits
from pipeline.models.chunked_logits import States
from pipeline.models.references import ModelRef
from pipeline.runs.console import progress

TOP = 128
BUCKETS = ((0, 32), (32, 128), (128, 512), (512, None))
"""Supervised tokens of an example, counted from 0: the later, the further the models may have drifted apart."""


def fingerprint(reference: ModelRef, dtype: torch.dtype, batches: Sequence[dict[str, Tensor]]) -> str:
    """Of all that decides what `record` keeps: the reference, its arithmetic, and the batches, as they are padded."""
    digest = xxhash.xxh3_128(f"{reference.fingerprint}\0{dtype}\0{TOP}\0{chunked_logits.CHUNK}".encode())
    for batch in batches:
        for name in ("input_ids", "labels"):
            digest.update(f"{tuple(batch[name].shape)}".encode() + batch[name].numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def record(model: Any, batches: Sequence[dict[str, Tensor]], directory: Path) -> None:
    """Keep the reference's predictions on the batches, a file a batch; `directory` appears whole or not at all."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for i, batch in enumerate(progress(batches, what="predictions of the reference", unit="batch")):
        kept = list(chunked_logits.map_chunks(_likeliest, (_states(model, batch),)))
        log_probs, tokens = (torch.cat(parts).cpu() for parts in zip(*kept, strict=True))
        save_file({"log_probs": log_probs, "tokens": tokens.int()}, _file(unfinished, i))
    unfinished.replace(directory)


@torch.no_grad()
def score(subject: Subject) -> dict[str, float]:
    """`kl_divergence`, of the model from the reference in nats, and `top1_agreement`: means over supervised tokens.

    Each with its 95 % interval, `_low` and `_high`, where there are two examples, and with /<first>-<last> for each
    bucket of positions that occurs. Agreement means that no token is likelier to the model than the reference's first.
    Empty where no predictions of a reference were recorded.
    """
    if subject.ref is None or subject.reference_predictions is None:
        return {}
    per_token, example = [], 0
    for i, batch in enumerate(progress(subject.batches, what=f"predictions of {subject.ref.name}", unit="batch")):
        kept = load_file(_file(subject.reference_predictions, i), device=str(subject.model.device))
        states = _states(subject.model, batch)
        found = torch.cat(list(chunked_logits.map_chunks(_compared, (states,), kept["log_probs"], kept["tokens"])))
        per_token.append(torch.cat([found.cpu(), _places(batch, example)], dim=1))
        example += len(batch["labels"])
    return _figures(torch.cat(per_token))


def _states(model: Any, batch: dict[str, Tensor]) -> States:
    """Up to the head, where a supervised token comes next, row by row of the batch."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    supervised = functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    return chunked_logits.compute_states(model, inputs, supervised.to(model.device))


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) -> log-probabilities as `_merged` gives them, and their tokens (n, TOP), the likeliest first."""
    tokens = logits.topk(min(TOP, logits.shape[1])).indices
    return _merged(logits.log_softmax(-1), tokens), tokens


def _merged(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """(n, V), (n, TOP) -> (n, TOP + 1): of these tokens, and of all others together if there are any."""
    chosen = log_probs.gather(1, tokens)
    if log_probs.shape[1] == tokens.shape[1]:
        return chosen
    others = log_probs.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([chosen, others], dim=1)


def _compared(logits: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """(n, V) of the model, and what was kept of the reference -> (n, 2) float64: divergence, and 1 for agreement."""
    own = logits.log_softmax(-1)
    model = _merged(own, tokens.long())
    divergence = functional.kl_div(model.double(), reference.double(), reduction="none", log_target=True).sum(1)
    agrees = model[:, 0] >= own.amax(1)
    return torch.stack([divergence, agrees.double()], dim=1)


def _places(batch: dict[str, Tensor], first_example: int) -> Tensor:
    """(n, 2) float64: which supervised token of its example each is, and which example, in the order of `_states`."""
    supervised = batch["labels"][:, 1:] != IGNORED
    position = (supervised.cumsum(1) - 1)[supervised]
    example = supervised.nonzero()[:, 0] + first_example
    return torch.stack([position, example], dim=1).double()


def _figures(per_token: Tensor) -> dict[str, float]:
    """(N, 4), divergence, agreement, position and example -> figures."""
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
    """Over examples, since the tokens of one resemble each other."""
    numbers, example = example.unique(return_inverse=True)
    if len(numbers) < 2:
        return {}
    totals = torch.zeros(len(numbers), 2, dtype=torch.float64)
    totals.index_add_(0, example, torch.stack([values, torch.ones_like(values)], dim=1))
    bounds = ratio_interval(*totals.T.numpy())
    return {f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def _file(directory: Path, batch: int) -> Path:
    return directory / f"{batch:06d}.safetensors"
