"""How far a model's predictions are from the reference's: divergence, and whether both would say the same token.

Two passes, so that two models are never in memory together: `record` keeps of the reference, for each supervised token
of the validation batches, its likeliest TOP tokens and their log-probabilities, 1 KiB a token in place of 800 KiB for a
vocabulary of 201,088; `score` holds a model against them. Logits exist for CHUNK tokens at a time.

All other tokens of the vocabulary count as one, so the divergence is a lower bound, which merging outcomes can only
lower (the data processing inequality; Cover and Thomas, Elements of Information Theory, 2.8). It is exact where the
vocabulary has no more than TOP tokens.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from pipeline.evals.subject import Subject
from pipeline.harmony import IGNORED
from pipeline.tracking import progress

TOP = 128
CHUNK = 512  # 0.4 GB of float32 logits for a vocabulary of 201,088
BUCKETS = ((0, 32), (32, 128), (128, 512), (512, None))
"""Supervised tokens of an example, counted from 0: the later, the further the models may have drifted apart."""


@torch.no_grad()
def record(model: Any, batches: Sequence[dict[str, Tensor]], directory: Path) -> None:
    """Keep the reference's predictions on the batches, a file a batch; `directory` appears whole or not at all."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for i, batch in enumerate(progress(batches, what="predictions of the reference", unit="batch")):
        kept = [_likeliest(log_probs) for log_probs in _log_probs(model, batch)]
        log_probs, tokens = (torch.cat(parts).cpu() for parts in zip(*kept, strict=True))
        save_file({"log_probs": log_probs, "tokens": tokens.int()}, _file(unfinished, i))
    unfinished.replace(directory)


@torch.no_grad()
def score(subject: Subject) -> dict[str, float]:
    """`kl_divergence`, of the model from the reference in nats, and `top1_agreement`: means over supervised tokens.

    With /<first>-<last> for each bucket of positions that occurs. Agreement means that no token is likelier to the
    model than the reference's first. Empty where no predictions of a reference were recorded.
    """
    if subject.ref is None or subject.reference_predictions is None:
        return {}
    per_token = []
    for i, batch in enumerate(progress(subject.batches, what=f"predictions of {subject.ref.name}", unit="batch")):
        kept = load_file(_file(subject.reference_predictions, i))
        chunks = zip(kept["log_probs"].split(CHUNK), kept["tokens"].split(CHUNK), strict=True)
        found = [_compared(own, *other) for own, other in zip(_log_probs(subject.model, batch), chunks, strict=True)]
        per_token.append(torch.cat([torch.cat(found).cpu(), _positions(batch)], dim=1))
    return _means(torch.cat(per_token))


def _log_probs(model: Any, batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """(n, V) float32, n up to CHUNK, of what comes at the supervised tokens, row by row of the batch."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    supervised = (batch["labels"][:, 1:] != IGNORED).to(hidden.device)
    for part in hidden[:, :-1][supervised].split(CHUNK):
        yield model.get_output_embeddings()(part).float().log_softmax(-1)


def _likeliest(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) -> log-probabilities as `_merged` gives them, and their tokens (n, TOP), the likeliest first."""
    tokens = log_probs.topk(min(TOP, log_probs.shape[1])).indices
    return _merged(log_probs, tokens), tokens


def _merged(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """(n, V), (n, TOP) -> (n, TOP + 1): of these tokens, and of all others together if there are any."""
    chosen = log_probs.gather(1, tokens)
    if log_probs.shape[1] == tokens.shape[1]:
        return chosen
    others = log_probs.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([chosen, others], dim=1)


def _compared(own: Tensor, log_probs: Tensor, tokens: Tensor) -> Tensor:
    """(n, V) of the model, and what was kept of the reference -> (n, 2) float64: divergence, and 1 for agreement."""
    reference = log_probs.to(own.device).double()
    model = _merged(own, tokens.to(own.device).long())
    divergence = functional.kl_div(model.double(), reference, reduction="none", log_target=True).sum(1)
    agrees = model[:, 0] >= own.amax(1)
    return torch.stack([divergence, agrees.double()], dim=1)


def _positions(batch: dict[str, Tensor]) -> Tensor:
    """(n, 1) float64: which supervised token of its example each is, in the order of `_log_probs`."""
    supervised = batch["labels"][:, 1:] != IGNORED
    return (supervised.cumsum(1) - 1)[supervised].double().unsqueeze(1)


def _means(per_token: Tensor) -> dict[str, float]:
    """(N, 3), divergence, agreement and position -> figures."""
    divergence, agrees, position = per_token.unbind(1)
    parts = {"": torch.ones_like(position, dtype=torch.bool)}
    for first, end in BUCKETS:
        name = f"/{first}-{end - 1}" if end else f"/{first}-"
        parts[name] = (position >= first) & (position < (end or torch.inf))
    return {
        f"{figure}{name}": float(values[part].mean())
        for figure, values in (("kl_divergence", divergence), ("top1_agreement", agrees))
        for name, part in parts.items()
        if part.any()
    }


def _file(directory: Path, batch: int) -> Path:
    return directory / f"{batch:06d}.safetensors"
