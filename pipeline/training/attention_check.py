"""Compare an attention implementation with eager before training, on a small random gpt-oss.

Each attention head of gpt-oss has a learned sink. The sink is one more logit in the softmax. It takes probability but
has no value. Kernels without support for sinks run without an error and train a different model. Some kernels use the
sink in the forward pass but do not compute its gradient. So every implementation other than eager is checked.

The same batch goes through the same weights three times:
1. with eager in float64, as the reference;
2. with eager in the precision of the run, to measure the error from rounding;
3. with the configured implementation. The largest allowed error is a few times the error of pass 2, plus a small
   constant.

The batch is longer than the sliding window and padded on the right, as in training. Every token goes to every expert.
Otherwise rounding could change a router's choice, which would hide errors of attention.

If training packs documents, there is another check. Its pass 3 has the documents in one row. Its passes 1 and 2 have
them in separate rows. So a kernel that lets packed documents attend to each other has a large error.
"""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.checkpoints.gpt_oss import ATTENTION, ATTENTION_TYPES, K_PROJ, Q_PROJ, SINKS, V_PROJ, in_layer
from pipeline.config import AUTO_ATTENTION, Precision, TrainConfig
from pipeline.data.harmony import IGNORED
from pipeline.errors import UserError
from pipeline.models import attention, packing_masks
from pipeline.models.attention import EAGER
from pipeline.models.loading import TRAIN_DTYPES
from pipeline.runs.console import say, warn

_VOCABULARY, _EXPERTS, _LENGTHS = 128, 2, (288, 256)
# The released models have the same head size, window and number of queries per key. Kernels support few other sizes.
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "num_hidden_layers": len(ATTENTION_TYPES),
    "layer_types": list(ATTENTION_TYPES),
    "sliding_window": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "num_local_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "pad_token_id": 0,
    "use_cache": False,
}
_PARTS = {"sinks": SINKS, "q": f"{Q_PROJ}.weight", "k": f"{K_PROJ}.weight", "v": f"{V_PROJ}.weight"}
_WHAT_FOR = {
    False: "gpt-oss, whose attention has sinks",
    True: "packed documents, which must not see each other",
}
_TIMES_ROUNDING = 4.0  # another order of summation can double the rounding error; the other factor of 2 is a margin
_ALWAYS_ALLOWED = 1e-5


def check(train: TrainConfig, section: str) -> str:
    """Check that an attention implementation has the same outputs and gradients as eager.

    If the setting is `auto`, the best implementation that passes is chosen. For each better implementation that fails,
    there is a warning.

    Args:
        train: settings of the stage. Only `attn_implementation`, `precision` and `packing` are used.
        section: name of `train` in the configuration, for messages.

    Returns:
        The name of the implementation.

    Raises:
        UserError: transformers does not know the implementation or cannot run it here, or its results are wrong.
    """
    if train.attn_implementation != AUTO_ATTENTION:
        _check_both(train, section)
        return train.attn_implementation
    dtype = attention.find_compute_type(train.precision)
    *better, last = attention.candidates(dtype, attention.capability(), packing=train.packing)
    chosen = next((name for name in better if _passes(name, train, section)), last)
    if chosen == last:
        _check_both(replace(train, attn_implementation=last), section)
    say(section, f"attn_implementation={AUTO_ATTENTION} chooses {chosen}")
    return chosen


def raise_if_wrong(train: TrainConfig, section: str) -> None:
    """Check the attention implementation that the user chose, without a message of success. `auto` chooses later.

    Raises:
        UserError: as for `check`.
    """
    if train.attn_implementation != AUTO_ATTENTION:
        _check_both(train, section, tells=False)


def _passes(name: str, train: TrainConfig, section: str) -> bool:
    try:
        _check_both(replace(train, attn_implementation=name), section)
    except UserError as error:
        warn(section, f"attn_implementation={AUTO_ATTENTION} does not choose {name}. {error}")
        return False
    return True


def _check_both(train: TrainConfig, section: str, *, tells: bool = True) -> None:
    kinds = [False] if train.attn_implementation != EAGER else []
    for is_packed in [*kinds, *([True] if train.packing else [])]:
        _check(train, section, is_packed=is_packed)
        if tells:
            alone = " keeps packed documents apart, and" if is_packed else ""
            what = "outputs and gradients of sinks, q, k and v"
            say(section, f"attn_implementation={train.attn_implementation}{alone} agrees with eager: {what}")


def _check(train: TrainConfig, section: str, *, is_packed: bool) -> None:
    name = train.attn_implementation
    setting = f"{section}.attn_implementation={name}"
    packed = f" with {section}.packing=true" if is_packed else ""
    try:
        found, rounding = measure_errors(name, train.precision, attention.device(), is_packed=is_packed)
    except (ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip("'\" \n").partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"{setting}: transformers cannot train gpt-oss with this attention here{packed} ({reason})."
            f" gpt-oss needs attention with sinks. Use {section}.attn_implementation={EAGER}."
        ) from error
    allowed = _TIMES_ROUNDING * rounding + _ALWAYS_ALLOWED
    wrong = {tensor: error for tensor, error in found.items() if not error <= allowed}  # NaN is wrong too
    if wrong:
        tensor = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
        raise UserError(
            f"{setting}: is wrong for {_WHAT_FOR[is_packed]}: {tensor} differs from eager by"
            f" {wrong[tensor]:.2g} (relative error). Rounding explains at most {allowed:.2g}."
            f" {len(wrong)} of {len(found)} tensors differ too much. Use {section}.attn_implementation={EAGER}."
        )


def measure_errors(
    name: str, precision: Precision, device: torch.device, *, is_packed: bool = False
) -> tuple[dict[str, float], float]:
    """Measure the errors of an implementation and of eager, both in `precision`. Eager in float64 counts as exact.

    Returns:
        The first value is the relative error of the implementation, ‖x - truth‖ / ‖truth‖, for each tensor. A missing
        gradient counts as zeros. The second value is the largest relative error of eager. It is one value for all
        tensors: eager's error of a small tensor, such as the eight sinks, can be small by chance.
    """
    truth, rounding = _reference(precision, device)
    configured = _run(name, TRAIN_DTYPES[precision], device, is_mixed=_is_mixed(precision), is_packed=is_packed)
    return {key: _relative_error(configured[key], truth[key]) for key in truth}, rounding


@cache
def _reference(precision: Precision, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """Compute the results of eager in float64, and the largest relative error of eager in `precision`.

    All checks of a process share them: the check with packing, the candidates of `auto`, and both training stages. The
    tensors take about 1.5 MB.
    """
    truth = _run(EAGER, torch.float64, device)
    eager = _run(EAGER, TRAIN_DTYPES[precision], device, is_mixed=_is_mixed(precision))
    return truth, max(_relative_error(eager[key], truth[key]) for key in truth)


def _is_mixed(precision: Precision) -> bool:
    return precision is Precision.mixed_bf16


def _run(
    name: str, dtype: torch.dtype, device: torch.device, *, is_mixed: bool = False, is_packed: bool = False
) -> dict[str, Tensor]:
    """Compute the logits at tokens that are not padding, and the gradients of each layer's sinks, q, k and v."""
    model = _make_model(name, dtype).to(device)
    batch = _pack(_make_batch()) if is_packed else _make_batch()
    batch = {key: value.to(device) for key, value in batch.items()}
    labels, is_real = batch.pop("labels"), batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    autocast = torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext()
    with autocast:
        logits = model(**batch).logits
    predicted = logits[:, :-1].flatten(0, 1).to(torch.float64)
    functional.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORED).backward()
    found = {"the output": logits.detach()[is_real]}
    for layer, kind in enumerate(ATTENTION_TYPES):
        for part, parameter in _PARTS.items():
            weight = model.get_parameter(in_layer(layer, f"{ATTENTION}.{parameter}"))
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            found[f"the gradient of {part} in a {kind.replace('_', '-')} layer"] = gradient
    return found


def _make_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Make a gpt-oss with the same random weights each time.

    The weights are so large that attention and sinks clearly change the output.
    """
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(**_SIZES)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=name, experts_implementation=EAGER
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                fan_in = 1 if parameter.ndim == 1 else parameter.shape[1]
                parameter.copy_(1 + 0.1 * noise if key.endswith("norm.weight") else noise * fan_in**-0.5)
    packing_masks.mask_documents(model)
    return model.to(dtype).train()


def _make_batch() -> dict[str, Tensor]:
    """Make input_ids, attention_mask and labels, each with the shape (B, T). The second row is padded on the right."""
    longest = max(_LENGTHS)
    ids = torch.randint(1, _VOCABULARY, (len(_LENGTHS), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) < torch.tensor(_LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), torch.tensor(IGNORED))}


def _pack(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pack a padded batch into one row, with positions instead of a mask.

    Each document's first label is ignored, so that the end of one document does not have to predict the start of the
    next.
    """
    is_real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1)[is_real]
    return {
        "input_ids": batch["input_ids"][is_real][None],
        "position_ids": positions[None],
        "labels": batch["labels"][is_real].where(positions > 0, torch.tensor(IGNORED))[None],
    }


def _relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())
