"""Very small gpt-oss models with random weights, made in memory."""

from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "attn_implementation": "eager",
}


def gpt_oss(vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """Make a model in float32. `changes` replace fields of its configuration."""
    torch.manual_seed(seed)
    return GptOssForCausalLM(GptOssConfig(vocab_size=vocab_size, **{**_SIZES, **changes}))
