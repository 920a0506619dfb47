"""Settings of `model`: the checkpoint to start from."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Optional

from omegaconf import MISSING

from pipeline.config.bounds import POSITIVE, SEED, Bound
from pipeline.numerics.formats import MXFP4

SYNTHETIC = "synthetic://"
"""Prefix of paths such as synthetic://tiny. Such models and data come with the program, without the internet."""

_BLOCKS = Bound(
    f"a positive multiple of {MXFP4.block_size}, the block size of MXFP4",
    lambda value: value > 0 and value % MXFP4.block_size == 0,
)
_WIDTH = Bound("at most 16384", lambda value: value <= 1 << 14)


_TINY = Bound("a whole number from 1 to 1024", lambda value: 1 <= value <= 1 << 10)
_VOCABULARY = Bound("a whole number from 1 to 1048576", lambda value: 1 <= value <= 1 << 20)


class Dtype(Enum):
    """Data type of a model's weights and arithmetic."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass
class TinyConfig:
    """The small random gpt-oss that `model.path=synthetic://tiny` generates."""

    num_hidden_layers: Annotated[int, _TINY] = 2
    """Number of decoder layers. Sliding and full attention alternate from layer to layer."""
    hidden_size: Annotated[int, _BLOCKS, _WIDTH] = 64
    """Width of the residual stream: a multiple of 32, the block size of MXFP4."""
    intermediate_size: Annotated[int, _BLOCKS, _WIDTH] = 96
    """Width of each expert: a multiple of 32. It differs from hidden_size, so transposed weights cannot load."""
    num_local_experts: Annotated[int, _TINY] = 8
    """Number of experts per layer."""
    num_experts_per_tok: Annotated[int, _TINY] = 4
    """Number of experts that the router chooses for each token."""
    num_attention_heads: Annotated[int, _TINY] = 4
    """Number of query heads."""
    num_key_value_heads: Annotated[int, _TINY] = 2
    """Number of key and value heads."""
    head_dim: Annotated[int, _TINY] = 32
    """Width of one attention head."""
    sliding_window: Annotated[int, POSITIVE] = 64
    """Window of the sliding-attention layers, in tokens."""
    vocab_size: Annotated[int, _VOCABULARY] = 768
    """Number of rows of the embedding. As in the released models, it is larger than the number of tokens."""
    shard_bytes: Annotated[int, POSITIVE] = 300_000
    """Largest size of one weight file, in bytes. The default is small, so that the model has several files."""
    seed: Annotated[int, SEED] = 0
    """Random seed of the weights."""


@dataclass
class ModelConfig:
    """The model to start from."""

    path: str = MISSING
    """Checkpoint to start from, MXFP4 or BF16: a directory, a hub id, synthetic://tiny (see model.tiny) or …://demo."""
    revision: Optional[str] = None
    """Revision of a hub id: a branch, tag or commit."""
    dtype: Dtype = Dtype.bfloat16
    """Data type of weights and arithmetic in evaluate and verify. Training uses sft.precision and qat.precision."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
