"""Attention masks for packed rows, so that the documents in a row do not attend to each other.

Positions mark the documents: they start at 0 again at each document's first token. transformers 5.14 can make masks
from positions, but `GptOssModel.forward` does not pass the positions on. So with kernels that use masks, packed
documents would attend to each other. `forward` accepts ready masks, so they are made here.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


def mask_documents(model: PreTrainedModel) -> None:
    """Make the masks of packed rows from their positions in every later forward pass.

    Args:
        model: a causal gpt-oss, or its body. Rows are packed if the inputs have `position_ids` (B, T) and no
            `attention_mask`, as in TRL's padding-free batches. Other inputs are not changed.
    """
    model.base_model.register_forward_pre_hook(_add_masks, with_kwargs=True)


def _add_masks(
    body: PreTrainedModel, positional: tuple[object, ...], inputs: dict[str, Any]
) -> tuple[object, dict[str, object]]:
    if inputs.get("position_ids") is None or inputs.get("attention_mask") is not None:
        return positional, inputs
    positions = inputs["position_ids"]
    # The function reads only its shape, type and device. The real embeddings are not computed yet.
    embedded = torch.empty((*positions.shape, 1), dtype=body.dtype, device=positions.device)
    masks = create_masks_for_generate(
        body.config, embedded, attention_mask=None, past_key_values=None, position_ids=positions
    )
    return positional, {**inputs, "attention_mask": masks}
