"""All knowledge of the architecture: which tensors a gpt-oss checkpoint has, which are experts, how they lie.

Legend: E experts, H hidden size, I intermediate size, nb = blocks per row = input dimension / 32.

Two layouts in the Hugging Face naming. Packed (as released): per projection `…_blocks` (E, out, nb, 16) and
`…_scales` (E, out, nb), uint8. Plain (as transformers trains): `gate_up_proj` (E, H, 2I) and `down_proj` (E, I, H),
that is (E, in, out): the transpose of the packed order. Blocks run along `in` in both. The columns of gate_up
alternate gate, up, gate, up.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import UserError
from pipeline.numerics.formats import MXFP4

MODEL_TYPE = "gpt_oss"
ARCHITECTURE = "GptOssForCausalLM"

QUANTIZATION_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
"""`quantization_config` of openai/gpt-oss-20b and -120b."""

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""The two stacks of expert weights of a layer, under `model.layers.N.mlp.experts.`."""

STOP_TOKENS = ("<|return|>", "<|call|>")
"""Tokens that end an assistant's turn at inference."""

SPECIAL_TOKENS = {
    199998: "<|startoftext|>",
    199999: "<|endoftext|>",
    200002: "<|return|>",
    200003: "<|constrain|>",
    200005: "<|channel|>",
    200006: "<|start|>",
    200007: "<|end|>",
    200008: "<|message|>",
    200012: "<|call|>",
    200018: "<|endofprompt|>",
    **{i: f"<|reserved_{i}|>" for i in (200000, 200001, 200004, *range(200009, 200012), *range(200013, 200018))},
}
"""The 21 special tokens of the released tokenizer (o200k_harmony) by id."""


@dataclass(frozen=True)
class TensorInfo:
    """Type (safetensors' name for it) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        size = BYTES_PER_VALUE[self.dtype]
        for length in self.shape:
            size *= length
        return size


BYTES_PER_VALUE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1, "F8_E8M0": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Shape:
    """The sizes that decide which tensors there are."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: dict[str, Any], where: object) -> "Shape":
        """Read from config.json.

        Raises:
            UserError: another architecture, or a size that is missing or not a positive whole number.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise UserError(
                f"{where}: model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}: not a gpt-oss checkpoint."
            )
        sizes = {name: config.get(name) for name in cls.__dataclass_fields__}
        bad = [f"{name}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
        if bad:
            raise UserError(f"{where}: {', '.join(bad)}: must be a positive whole number.")
        return cls(**sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ExpertProjection:
    """One stack of expert weights: `name` is its parameter in the plain layout, of shape (E, in, out)."""

    name: str
    layer: int
    experts: int
    in_features: int
    out_features: int

    @property
    def blocks(self) -> str:
        """Name of the packed codes."""
        return f"{self.name}_blocks"

    @property
    def scales(self) -> str:
        """Name of the scales."""
        return f"{self.name}_scales"

    @property
    def values(self) -> int:
        """Number of weights."""
        return self.experts * self.in_features * self.out_features

    def packed_tensors(self) -> dict[str, TensorInfo]:
        """The two tensors of the packed layout."""
        rows = (self.experts, self.out_features, self.in_features // MXFP4.block_size)
        return {
            self.blocks: TensorInfo("U8", (*rows, MXFP4.block_size // 2)),
            self.scales: TensorInfo("U8", rows),
        }

    def plain_tensor(self, dtype: str = "BF16") -> TensorInfo:
        """The tensor of the plain layout."""
        return TensorInfo(dtype, (self.experts, self.in_features, self.out_features))


def expert_projections(shape: Shape) -> list[ExpertProjection]:
    """Every expert weight of the model, in layer order: gate_up_proj, then down_proj."""
    found = []
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
        found.append(ExpertProjection(f"{prefix}gate_up_proj", layer, experts, hidden, 2 * inner))
        found.append(ExpertProjection(f"{prefix}down_proj", layer, experts, inner, hidden))
    return found


def other_tensors(shape: Shape, dtype: str = "BF16") -> dict[str, TensorInfo]:
    """Every tensor that is not an expert weight; the same in both layouts."""
    hidden, experts = shape.hidden_size, shape.num_local_experts
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    per_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.o_proj.bias": (hidden,),
        "self_attn.sinks": (shape.num_attention_heads,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * shape.intermediate_size),
        "mlp.experts.down_proj_bias": (experts, hidden),
    }
    tensors = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        tensors |= {f"model.layers.{layer}.{name}": size for name, size in per_layer.items()}  # type: ignore[misc]
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab_size, hidden)}  # type: ignore[dict-item]
    return {name: TensorInfo(dtype, size) for name, size in tensors.items()}


def packed_layout(shape: Shape) -> dict[str, TensorInfo]:
    """Every tensor of a released (MXFP4) checkpoint."""
    tensors = other_tensors(shape)
    for projection in expert_projections(shape):
        tensors |= projection.packed_tensors()
    return tensors


def plain_layout(shape: Shape, dtype: str = "BF16") -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint that transformers can train."""
    tensors = other_tensors(shape, dtype)
    for projection in expert_projections(shape):
        tensors[projection.name] = projection.plain_tensor(dtype)
    return tensors
