"""Several documents in one row of a batch, kept from attending to each other.

Positions say where a document begins: they start at 0 again. transformers 5.14 knows how to make masks of that, but
`GptOssModel.forward` does not hand the positions on to where its masks are made, so with kernels that go by masks
packed documents would see each other. It accepts masks that were made before, which is what happens here.
"""

from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate


def keep_apart(model: Any) -> None:
    """From now on, make the masks of packed rows from their positions.

    Args:
        model: a causal gpt-oss, or its body. A row is packed if it comes with `position_ids` (B, T) and without
            `attention_mask`, as TRL's padding-free batches do; any other input goes its usual way.
    """
    model.base_model.register_forward_pre_hook(_with_masks, with_kwargs=True)


def _with_masks(body: Any, positional: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if inputs.get("position_ids") is None or inputs.get("attention_mask") is not None:
        return positional, inputs
    positions = inputs["position_ids"]
    # Only shape, type and place are read of it; the embedding itself is not there yet.
    embedded = torch.empty((*positions.shape, 1), dtype=body.dtype, device=positions.device)
    masks = create_masks_for_generate(
        body.config, embedded, attention_mask=None, past_key_values=None, position_ids=positions
    )
    return positional, {**inputs, "attention_mask": masks}
