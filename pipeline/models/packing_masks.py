"""Make attention masks for packed rows, so that the documents in a row do not attend to each other.

Positions mark the documents: each document's first token has position 0. Functions of transformers 5.14 can make masks
from positions, but `GptOssModel.forward` does not pass the positions on. With transformers' masks, packed documents
would therefore attend to each other. `forward` accepts ready masks, so this module makes them.

`fused_sinks` needs no mask. It needs only the bounds of the documents. TRL's collator computes them on the host. If a
batch has no bounds, this module computes them from the positions.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from pipeline.checkpoints.gpt_oss import ATTENTION_TYPES
from pipeline.models.attention import FUSED_SINKS
from pipeline.models.sink_attention import Segments, packed_row


def mask_documents(model: PreTrainedModel) -> None:
    """Make every later forward pass compute the masks of packed rows from `position_ids`.

    Args:
        model: a causal gpt-oss model, or its body. Rows are packed if the inputs have `position_ids` (B, T), but no
            `attention_mask` and no cache, as in TRL's padding-free batches. Other inputs are not changed.
    """
    model.base_model.register_forward_pre_hook(_add_masks, with_kwargs=True)


def _add_masks(
    body: PreTrainedModel, positional: tuple[object, ...], inputs: dict[str, Any]
) -> tuple[object, dict[str, object]]:
    is_packed = inputs.get("position_ids") is not None and inputs.get("attention_mask") is None
    if not is_packed or inputs.get("past_key_values") is not None:
        return positional, inputs
    positions = inputs["position_ids"]
    if body.config._attn_implementation == FUSED_SINKS:
        return positional, {**inputs, "attention_mask": dict.fromkeys(ATTENTION_TYPES, _segments(inputs))}
    # An empty tensor stands for the embeddings, because `create_masks_for_generate` reads only their type, device and
    # first two dimensions.
    embedded = torch.empty((*positions.shape, 1), dtype=body.dtype, device=positions.device)
    masks = create_masks_for_generate(
        body.config, embedded, attention_mask=None, past_key_values=None, position_ids=positions
    )
    return positional, {**inputs, "attention_mask": masks}


def _segments(inputs: dict[str, Any]) -> Segments:
    bounds, positions = inputs.get("cu_seq_lens_q"), inputs["position_ids"]
    if bounds is None:
        return packed_row(positions)
    return Segments(bounds.to(positions.device), int(inputs["max_length_q"]))
