"""The architecture of gpt-oss: names, types and shapes of the tensors in a checkpoint.

Legend: E = experts, H = hidden size, I = intermediate size, nb = blocks per row = input dimension / 32.

Hugging Face checkpoints come in two layouts, which differ only in the expert weights:
- Packed, as released: each projection is `…_blocks` (E, out, nb, 16) and `…_scales` (E, out, nb), both uint8.
- Plain, which transformers can train: `gate_up_proj` is (E, H, 2I) and `down_proj` is (E, I, H). Both are
  (E, in, out), the transpose of the packed order.
In both layouts, a block of 32 values runs along `in`. The columns of gate_up alternate: gate, up, gate, up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from pipeline.checkpoints.config_keys import MOST_EXPERTS, MOST_LAYERS, MOST_WIDTH, list_wrong_keys
from pipeline.checkpoints.dtypes import bytes_per_value
from pipeline.errors import UserError, user_errors
from pipeline.numerics.formats import MXFP4

MODEL_TYPE = "gpt_oss"
ARCHITECTURE = "GptOssForCausalLM"

MODELING_MODULE = "transformers.models.gpt_oss.modeling_gpt_oss"
DECODER_LAYER_CLASS = "GptOssDecoderLayer"
"""Name of the class of decoder layers in MODELING_MODULE."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

ATTENTION = "self_attn"
"""Name of the attention module of a layer, relative to `model.layers.N.`."""
Q_PROJ, K_PROJ, V_PROJ, O_PROJ = ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers of the attention module."""
SINKS = "sinks"
"""Parameter of the attention module: one learned logit per query head."""
ATTENTION_TYPES = ("sliding_attention", "full_attention")
"""The two types of layers, by their names in `layer_types` of config.json. Layers of the two types alternate."""

ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
"""Norms before the attention and before the experts, relative to `model.layers.N.`."""

MLP = "mlp"
ROUTER = f"{MLP}.router"
EXPERTS = f"{MLP}.experts"
"""Name of the module with the experts of a layer, relative to `model.layers.N.`."""
GATE_UP, DOWN = EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Names of the two stacks of expert weights in a layer. They are parameters of the EXPERTS module."""
BIAS_SUFFIX = "_bias"
EXPERT_BIASES = (GATE_UP + BIAS_SUFFIX, DOWN + BIAS_SUFFIX)
"""Names of the biases of the two stacks. Each bias is (E, out)."""
EXPERT_PATTERN = f"*{EXPERTS}*_proj"
"""Wildcard that matches every stack of expert weights, with or without PEFT's wrapper."""

BLOCKS_SUFFIX, SCALES_SUFFIX = PACKED_SUFFIXES = ("_blocks", "_scales")
"""Suffixes that the packed layout appends to the name of a stack of expert weights."""

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

STOP_TOKENS = ("<|return|>", "<|call|>")
"""Tokens that end the assistant's turn at inference."""

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
"""Id -> text of the 21 special tokens of the released tokenizer (o200k_harmony)."""


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor. `dtype` is the name of the type in safetensors."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        size = bytes_per_value(self.dtype)
        for length in self.shape:
            size *= length
        return size


class _Sizes(TypedDict):
    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int


class GptOssJson(_Sizes, total=False):
    """The keys of a gpt-oss config.json that are read by name. `Shape.of` checks their values, and reads the sizes."""

    layer_types: list[str] | None
    sliding_window: int | None
    quantization_config: dict[str, object] | None


_MOST = {"num_hidden_layers": MOST_LAYERS, "num_local_experts": MOST_EXPERTS}  # of the others: MOST_WIDTH


@dataclass(frozen=True)
class Shape:
    """The sizes in config.json that determine the shapes of all tensors."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, object], where: object) -> "Shape":
        """Read the sizes from the content of config.json. `where` is the path of config.json, for messages.

        Raises:
            UserError: the model has another architecture; or a size is missing, too large, or not a positive whole
                number; or another key has a wrong value, see `config_keys`.
        """
        if config.get("model_type") != MODEL_TYPE:
            raise UserError(
                f"{where}: model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}. Use a gpt-oss checkpoint,"
                " such as model.path=openai/gpt-oss-20b."
            )
        sizes = {name: config.get(name) for name in cls.__dataclass_fields__}
        bad = [f"{name}={value!r}" for name, value in sizes.items() if type(value) is not int or value < 1]
        if bad:
            raise UserError(f"{where}: {', '.join(bad)}: must be a positive whole number.")
        large = [
            f"{where}: {name}={value}: must be at most {_MOST.get(name, MOST_WIDTH)}."
            for name, value in sizes.items()
            if isinstance(value, int) and value > _MOST.get(name, MOST_WIDTH)
        ]
        if problems := large or [f"{where}: {wrong}" for wrong in list_wrong_keys(config, ATTENTION_TYPES)]:
            raise user_errors(problems)
        return cls(**sizes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ExpertProjection:
    """One stack of expert weights. `name` is the name of the plain layout's parameter, whose shape is (E, in, out)."""

    name: str
    layer: int
    experts: int
    in_features: int
    out_features: int

    @property
    def kind(self) -> str:
        """Name of the projection: one of EXPERT_WEIGHTS."""
        return self.name.rpartition(".")[2]

    @property
    def blocks(self) -> str:
        """Name of the blocks in the packed layout."""
        return packed_names(self.name)[0]

    @property
    def scales(self) -> str:
        """Name of the scales in the packed layout."""
        return packed_names(self.name)[1]

    @property
    def values(self) -> int:
        """Number of weights."""
        return self.experts * self.in_features * self.out_features

    def packed_tensors(self) -> dict[str, TensorInfo]:
        """Return the two tensors of the packed layout: name -> type and shape."""
        rows = (self.experts, self.out_features, self.in_features // MXFP4.block_size)
        return {
            self.blocks: TensorInfo("U8", (*rows, MXFP4.block_size // 2)),
            self.scales: TensorInfo("U8", rows),
        }

    def plain_tensor(self, dtype: str = "BF16") -> TensorInfo:
        """Return the type and shape of the tensor in the plain layout."""
        return TensorInfo(dtype, (self.experts, self.in_features, self.out_features))


def in_layer(layer: int, name: str) -> str:
    """Return the full name of a module or parameter of a decoder layer."""
    return f"model.layers.{layer}.{name}"


def attention_projection(layer: int, name: str) -> str:
    """Return the full name of a module in ATTENTION_PROJECTIONS. The module has a `weight` and a `bias`."""
    return in_layer(layer, f"{ATTENTION}.{name}")


def expert_parameter(layer: int, name: str) -> str:
    """Return the full name of a parameter in EXPERT_WEIGHTS or EXPERT_BIASES. The plain layout uses this name."""
    return in_layer(layer, f"{EXPERTS}.{name}")


def packed_names(name: str) -> tuple[str, str]:
    """Return the names of the blocks and scales that hold a stack of expert weights in the packed layout."""
    return name + BLOCKS_SUFFIX, name + SCALES_SUFFIX


def is_packed_name(name: str) -> bool:
    """Return whether a tensor of this name holds blocks or scales of the packed layout."""
    return name.endswith(PACKED_SUFFIXES)


def expert_projections(shape: Shape) -> list[ExpertProjection]:
    """List every stack of expert weights, layer by layer: gate_up_proj of a layer, then its down_proj."""
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    found = []
    for layer in range(shape.num_hidden_layers):
        found.append(ExpertProjection(expert_parameter(layer, GATE_UP), layer, experts, hidden, 2 * inner))
        found.append(ExpertProjection(expert_parameter(layer, DOWN), layer, experts, inner, hidden))
    return found


def other_tensors(shape: Shape, dtype: str = "BF16") -> dict[str, TensorInfo]:
    """List every tensor that is not an expert weight. These tensors are the same in both layouts."""
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, shape.hidden_size)}
    for layer in range(shape.num_hidden_layers):
        tensors |= {in_layer(layer, name): size for name, size in _other_tensors_of_layer(shape).items()}
    tensors |= {FINAL_NORM: (shape.hidden_size,), HEAD: (shape.vocab_size, shape.hidden_size)}
    return {name: TensorInfo(dtype, size) for name, size in tensors.items()}


def packed_tensors(shape: Shape) -> dict[str, TensorInfo]:
    """List every tensor of a packed (MXFP4) checkpoint, as released."""
    tensors = other_tensors(shape)
    for projection in expert_projections(shape):
        tensors |= projection.packed_tensors()
    return tensors


def plain_tensors(shape: Shape, dtype: str = "BF16") -> dict[str, TensorInfo]:
    """List every tensor of a plain checkpoint, which transformers can train."""
    tensors = other_tensors(shape, dtype)
    for projection in expert_projections(shape):
        tensors[projection.name] = projection.plain_tensor(dtype)
    return tensors


def loaded_bytes(shape: Shape, width: int, *, stays_packed: bool) -> int:
    """Compute the size of a model in memory, in bytes.

    Args:
        shape: shape of the model.
        width: size of an unpacked value, in bytes.
        stays_packed: whether the experts stay packed in memory.
    """
    tensors = packed_tensors(shape) if stays_packed else plain_tensors(shape)
    return sum(info.bytes if is_packed_name(name) else math.prod(info.shape) * width for name, info in tensors.items())


def _other_tensors_of_layer(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, experts = shape.hidden_size, shape.num_local_experts
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        ATTENTION_NORM: (hidden,),
        f"{ATTENTION}.{Q_PROJ}.weight": (queries, hidden),
        f"{ATTENTION}.{Q_PROJ}.bias": (queries,),
        f"{ATTENTION}.{K_PROJ}.weight": (keys, hidden),
        f"{ATTENTION}.{K_PROJ}.bias": (keys,),
        f"{ATTENTION}.{V_PROJ}.weight": (keys, hidden),
        f"{ATTENTION}.{V_PROJ}.bias": (keys,),
        f"{ATTENTION}.{O_PROJ}.weight": (hidden, queries),
        f"{ATTENTION}.{O_PROJ}.bias": (hidden,),
        f"{ATTENTION}.{SINKS}": (shape.num_attention_heads,),
        MLP_NORM: (hidden,),
        f"{ROUTER}.weight": (experts, hidden),
        f"{ROUTER}.bias": (experts,),
        f"{EXPERTS}.{GATE_UP}{BIAS_SUFFIX}": (experts, 2 * shape.intermediate_size),
        f"{EXPERTS}.{DOWN}{BIAS_SUFFIX}": (experts, hidden),
    }
