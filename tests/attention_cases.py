"""Inputs of attention with sinks, and the results of eager attention, for tests on CPUs and GPUs.

Legend: B = rows; T = tokens in a row; N = query heads; K = key heads; d = size of a head.
"""

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from pipeline.models import sink_attention
from pipeline.models.sink_attention import Segments

HEADS, KEY_HEADS, SIZE, WINDOW, LENGTH = 16, 2, 64, 128, 300
SCALE = SIZE**-0.5
PARTS = ("the output", "query", "key", "value", "sinks")
SPANS = {
    "no padding": [(0, LENGTH), (0, LENGTH)],
    "padding on the right": [(0, LENGTH), (0, 170)],
    "padding on the left": [(40, LENGTH), (0, LENGTH)],
    "padding on both sides": [(5, 210), (130, LENGTH)],
    "a row of padding": [(0, LENGTH), (0, 0)],
}
WINDOWS = {"full": None, "sliding": WINDOW}


def spans_mask(spans: list[tuple[int, int]]) -> Tensor:
    places = torch.arange(LENGTH)
    return torch.stack([(places >= first) & (places < last) for first, last in spans])


def eager_mask(is_real: Tensor, documents: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Make the mask (B, 1, T, T).

    A query sees a key if the key is a real token and is not later than the query. Both must be in one document, and the
    key must be in the query's window.
    """
    places = torch.arange(LENGTH, device=is_real.device)
    age = places[:, None] - places
    seen = (age >= 0) & (age < (window or LENGTH)) & is_real[:, None, :] & (documents[..., None] == documents[:, None])
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def inputs(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Make the inputs of attention, and a gradient of its output.

    The gradient has the shape (B, T, N, d). BF16 represents all values exactly.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device, dtype)

    made = {
        "query": 2 * draw(2, HEADS, LENGTH, SIZE),
        "key": draw(2, KEY_HEADS, LENGTH, SIZE),
        "value": draw(2, KEY_HEADS, LENGTH, SIZE),
        "sinks": 2 * draw(HEADS),
    }
    return {name: each.requires_grad_() for name, each in made.items()}, draw(2, LENGTH, HEADS, SIZE)


def run(
    function: Any, mask: Any, dtype: torch.dtype, window: int | None, is_real: Tensor, autocast: bool = False
) -> dict[str, Tensor]:
    """Compute the output at real tokens, and the gradients. Padding has no loss, as in training."""
    tensors, grad = inputs(torch.float32 if autocast else dtype, is_real.device)
    module = SimpleNamespace(sinks=tensors["sinks"], num_key_value_groups=HEADS // KEY_HEADS, training=True)
    with torch.autocast(is_real.device.type, torch.bfloat16, enabled=autocast):
        out, _ = function(
            module, *(tensors[name] for name in ("query", "key", "value")), mask, SCALE, sliding_window=window
        )
    out.backward(grad.to(out.dtype) * is_real[..., None, None])
    return {"the output": out.detach()[is_real], **{name: each.grad for name, each in tensors.items()}}


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {part: float((found[part].double() - truth[part]).norm() / truth[part].norm()) for part in PARTS}


def packed_positions() -> tuple[Tensor, Tensor]:
    """Make the positions (B, T) of packed documents, and for each token the number of its document."""
    lengths = [[1, 199, 100], [300]]
    positions = torch.stack([torch.cat([torch.arange(each) for each in row]) for row in lengths])
    return positions, (positions == 0).cumsum(1)


@lru_cache(maxsize=1)  # a case runs in several precisions, one after the other
def truth(
    rows: tuple[tuple[bool, ...], ...], documents: tuple[tuple[int, ...], ...], window: int | None, device: torch.device
) -> dict[str, Tensor]:
    """Compute eager attention in float64. `rows` marks the real tokens, and `documents` numbers their documents."""
    is_real = torch.tensor(rows, device=device)
    mask = eager_mask(is_real, torch.tensor(documents, device=device), window, torch.double)
    return run(eager_attention_forward, mask, torch.double, window, is_real)


def assert_as_close_as_eager(
    segments: Segments, is_real: Tensor, documents: Tensor, window: int | None, precision: str
) -> None:
    """Assert that no error is more than twice eager's error in the same precision. Eager in float64 counts as exact."""
    rows, numbers = (tuple(map(tuple, each.tolist())) for each in (is_real, documents))
    exact = truth(rows, numbers, window, is_real.device)
    is_mixed = precision == "mixed"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    mask = eager_mask(is_real, documents, window, dtype)
    eager = errors(run(eager_attention_forward, mask, dtype, window, is_real, is_mixed), exact)
    ours = errors(run(sink_attention.attend, segments, dtype, window, is_real, is_mixed), exact)
    assert all(ours[part] <= 2 * eager[part] + 1e-6 for part in PARTS), (ours, eager)
