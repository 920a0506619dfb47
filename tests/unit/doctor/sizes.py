"""A model of a few values, for expected values that are computed by hand."""

from dataclasses import replace
from typing import Any

from pipeline.config import LoraConfig, LoraTarget, Method, Precision, TrainConfig
from pipeline.doctor.work import Model

SMALL: dict[str, Any] = {
    "model_type": "gpt_oss",
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_local_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 10,
}
MODEL = Model.of(SMALL, "model")
ATTENTION, ROUTER, HEAD, EXPERT = 2 * 4 * 2 * (2 + 1), 4 * 4, 4 * 10, 3 * 4 * 8
PROJECTIONS, CHOSEN, EXPERTS = ATTENTION + ROUTER, 2 * EXPERT, 4 * EXPERT
ACTIVE = PROJECTIONS + HEAD + CHOSEN
FULL = TrainConfig(precision=Precision.bf16, gradient_checkpointing=False)
LORA = replace(FULL, method=Method.lora, lora=LoraConfig(rank=3, targets=[LoraTarget.experts]))
