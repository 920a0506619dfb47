"""Whether an attention implementation may train gpt-oss: compared with eager on a small random model before it does.

Each query of gpt-oss attends to one more logit, its head's learned sink, which takes probability and gives no value.
Kernels that know nothing of it run all the same and train another model; some honour it in the forward pass and leave
its gradient out. So nothing is trusted by its name. The same batch goes through the same weights three times: with
eager in float64, as the truth; with eager in the precision of the run, whose distance from the truth is what rounding
costs; and with the implementation asked for, which may be a few times as far away. The batch is longer than the sliding
window and padded on the right, as training pads; every token goes to every expert, since a choice that rounding flips
would hide what attention does. Where training packs, the implementation also gets the same documents packed into one
row, and the truth stays that of each alone: a kernel that lets them see each other is off by far.
"""

import math
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline import documents
from pipeline.config import Precision, TrainConfig
from pipeline.errors import UserError
from pipeline.harmony import IGNORED
from pipeline.models import TRAIN_DTYPES
from pipeline.tracking import say

_EAGER = "eager"
_LAYERS = ("sliding_attention", "full_attention")
_VOCABULARY, _EXPERTS, _LENGTHS = 128, 2, (288, 256)
# Heads of 64, eight queries to a key, and the window are those of the released models: kernels are made for such sizes.
_SIZES: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "num_hidden_layers": len(_LAYERS),
    "layer_types": list(_LAYERS),
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
_PARTS = {"sinks": "sinks", "q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight"}
_WHAT_FOR = {
    False: "gpt-oss, whose attention has sinks",
    True: "packed documents, which must not see each other",
}
_TIMES_ROUNDING = 4.0  # another order of sums costs about as much again
_ALWAYS_ALLOWED = 1e-5


def check(train: TrainConfig, section: str) -> None:
    """Refuse an attention implementation that does not compute, or does not differentiate, what eager does.

    Args:
        train: `attn_implementation`, `precision` and `packing` are looked at.
        section: name of `train` in the configuration, for messages.

    Raises:
        UserError: transformers does not know it or cannot run it here, or a tensor differs: which, and by how much.
    """
    if train.attn_implementation != _EAGER:
        _check(train, section, is_packed=False)
    if train.packing:
        _check(train, section, is_packed=True)


def _check(train: TrainConfig, section: str, is_packed: bool) -> None:
    name = train.attn_implementation
    setting = f"{section}.attn_implementation={name}"
    packed = f" with {section}.packing=true" if is_packed else ""
    try:
        found, rounding = errors(name, train.precision, _device(), is_packed)
    except (ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip("'\" \n").partition("\n")[0].partition(". ")[0]
        raise UserError(
            f"{setting}: transformers cannot train gpt-oss, whose attention has sinks, with it here{packed} ({reason})."
            f" Use {section}.attn_implementation={_EAGER}."
        ) from error
    allowed = _TIMES_ROUNDING * rounding + _ALWAYS_ALLOWED
    wrong = {tensor: distance for tensor, distance in found.items() if not distance <= allowed}  # NaN is wrong too
    if wrong:
        tensor = max(wrong, key=lambda name: math.inf if math.isnan(wrong[name]) else wrong[name])
        raise UserError(
            f"{setting}: is wrong for {_WHAT_FOR[is_packed]}: {tensor} differs from eager by"
            f" {wrong[tensor]:.2g} (relative), where rounding explains {allowed:.2g}; {len(wrong)} of {len(found)}"
            f" tensors are off. Use {section}.attn_implementation={_EAGER}."
        )
    alone = " keeps packed documents apart, and" if is_packed else ""
    say(section, f"attn_implementation={name}{alone} agrees with eager: outputs and gradients of sinks, q, k and v")


def errors(
    name: str, precision: Precision, device: torch.device, is_packed: bool = False
) -> tuple[dict[str, float], float]:
    """How far an implementation is from eager in float64, and how far eager in the same precision is at most.

    Returns:
        Tensor -> relative error ‖x - truth‖ / ‖truth‖ of the implementation, a gradient that is not there counting as
        zeros; and the largest such error of eager in `precision`. (The largest: that of a single small tensor, such as
        the eight sinks, is small by chance.)
    """
    truth = _tensors(_EAGER, torch.float64, False, device)
    dtype, is_mixed = TRAIN_DTYPES[precision], precision is Precision.mixed_bf16
    eager = _tensors(_EAGER, dtype, is_mixed, device)
    asked_for = _tensors(name, dtype, is_mixed, device, is_packed)
    rounding = max(_distance(eager[key], truth[key]) for key in truth)
    return {key: _distance(asked_for[key], truth[key]) for key in truth}, rounding


def _tensors(
    name: str, dtype: torch.dtype, is_mixed: bool, device: torch.device, is_packed: bool = False
) -> dict[str, Tensor]:
    """Logits of real tokens, and the gradients of each layer's sinks, q, k and v."""
    model, batch = _model(name, dtype).to(device), _packed(_batch()) if is_packed else _batch()
    batch = {key: value.to(device) for key, value in batch.items()}
    labels, is_real = batch.pop("labels"), batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    autocast = torch.autocast(device.type, torch.bfloat16) if is_mixed else nullcontext()
    with autocast:
        logits = model(**batch).logits
    predicted = logits[:, :-1].flatten(0, 1).to(torch.float64)
    functional.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORED).backward()
    found = {"the output": logits.detach()[is_real]}
    for layer, kind in zip(model.model.layers, _LAYERS, strict=True):
        for part, parameter in _PARTS.items():
            weight = layer.self_attn.get_parameter(parameter)
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            found[f"the gradient of {part} in a {kind.replace('_', '-')} layer"] = gradient
    return found


def _model(name: str, dtype: torch.dtype) -> Any:
    """A gpt-oss with the same weights every time, large enough for attention and sinks to matter."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(**_SIZES)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=name, experts_implementation=_EAGER
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator)
                fan_in = 1 if parameter.ndim == 1 else parameter.shape[1]
                parameter.copy_(1 + 0.1 * drawn if key.endswith("norm.weight") else drawn * fan_in**-0.5)
    documents.keep_apart(model)
    return model.to(dtype).train()


def _batch() -> dict[str, Tensor]:
    """input_ids, attention_mask, labels (B, T); the second row is padded on the right."""
    longest = max(_LENGTHS)
    ids = torch.randint(1, _VOCABULARY, (len(_LENGTHS), longest), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) < torch.tensor(_LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), torch.tensor(IGNORED))}


def _packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The documents of a padded batch in one row, with positions in place of the mask; none predicts the next one."""
    is_real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1)[is_real]
    return {
        "input_ids": batch["input_ids"][is_real][None],
        "position_ids": positions[None],
        "labels": batch["labels"][is_real].where(positions > 0, torch.tensor(IGNORED))[None],
    }


def _distance(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def _device() -> torch.device:
    """Where this process will train."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
