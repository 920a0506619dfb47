"""Count the FLOPs and the bytes of memory traffic of a forward pass, an optimizer step, GPTQ and generation.

The counts cover matrix products, attention, weights and optimizer states. Activations, norms and communication between
GPUs are left out. `time` divides the counts by the speed of a device.

Legend: L = layers, H = hidden size, I = intermediate size, V = vocabulary, N = query heads, G = key-value heads,
D = head dimension, E = experts of a layer, K = experts per token, r = rank of the adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoints.dtypes import TRAIN_TYPES, bytes_per_value
from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import LoraTarget, Method, Precision, TrainConfig, adapted_layers
from pipeline.doctor.activations import compute_width
from pipeline.numerics.formats import MXFP4

_PACKED_BYTES = MXFP4.bits_per_value / 8
_FULL_ATTENTION = "full_attention"
_BF16_BYTES = bytes_per_value("BF16")


@dataclass(frozen=True)
class Work:
    """What a device has to do.

    Attributes:
        flops: floating-point operations of matrix products in the training precision. A multiply-add counts as 2.
        fp32_flops: the same in FP32, which tensor cores do not speed up.
        memory_bytes: bytes that the device reads from its memory and writes to it.
        disk_bytes: bytes that are read from disk and written to it.
    """

    flops: float = 0.0
    fp32_flops: float = 0.0
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, count: float) -> "Work":
        """Return the work of doing this `count` times."""
        return Work(*(count * value for value in vars(self).values()))


@dataclass(frozen=True)
class Model:
    """The sizes of a model that determine its work, in values (not bytes).

    Attributes:
        shape: shape of the model.
        experts_per_token: K.
        full_layers: number of layers whose attention sees the whole context.
        window: number of tokens that the other layers see.
    """

    shape: Shape
    experts_per_token: int
    full_layers: int
    window: int

    @classmethod
    def of(cls, config: Mapping[str, Any], where: object) -> "Model":
        """Read the sizes from the content of config.json. Without `layer_types`, every layer has full attention."""
        shape = Shape.of(config, where)
        types = config.get("layer_types") or [_FULL_ATTENTION] * shape.num_hidden_layers
        full, window = types.count(_FULL_ATTENTION), config.get("sliding_window") or 0
        return cls(shape, int(config["num_experts_per_tok"]), full, window)

    @property
    def attention_values(self) -> int:
        """Values of the attention projections q, k, v and o: L·2·H·D·(N + G)."""
        s = self.shape
        return s.num_hidden_layers * 2 * s.hidden_size * s.head_dim * (s.num_attention_heads + s.num_key_value_heads)

    @property
    def expert_values(self) -> int:
        """Values of all experts: L·E·3·H·I."""
        s = self.shape
        return s.num_hidden_layers * s.num_local_experts * 3 * s.hidden_size * s.intermediate_size

    @property
    def dense_values(self) -> int:
        """Values that each token is multiplied by, beside its experts: attention, routers (L·H·E) and head (H·V)."""
        s = self.shape
        routers = s.num_hidden_layers * s.hidden_size * s.num_local_experts
        return self.attention_values + routers + s.hidden_size * s.vocab_size

    @property
    def active_values(self) -> int:
        """Values that each token is multiplied by. 3.6 × 10^9 for gpt-oss-20b, as its model card says.

        This leaves out the embedding, which is only looked up.
        """
        return self.dense_values + self.expert_values * self.experts_per_token // self.shape.num_local_experts

    def scores(self, context: float) -> float:
        """FLOPs per token of the attention scores and of the sum over values: 4·N·D per visible token and layer."""
        s = self.shape
        others = s.num_hidden_layers - self.full_layers
        visible = self.full_layers * context + others * min(context, self.window)
        return 4 * s.num_attention_heads * s.head_dim * visible

    def forward(self, context: float) -> float:
        """FLOPs per token of a forward pass: 2 per active value, and the scores. `context`: tokens seen on average."""
        return 2 * self.active_values + self.scores(context)


def adapter_values(model: Model, train: TrainConfig) -> float:
    """Count the adapter values that a token is multiplied by. An adapter on a weight (in, out) has r·(in + out).

    A token passes through the adapters of K experts: K·r·(2·(H + I) + …), as gate_up has 2·I outputs.
    """
    if train.method is not Method.lora:
        return 0.0
    s, r = model.shape, train.lora.rank
    queries, keys = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    attention = r * (2 * (s.hidden_size + queries) + 2 * (s.hidden_size + keys))
    experts = model.experts_per_token * r * (2 * s.hidden_size + 3 * s.intermediate_size)
    per_target = {LoraTarget.attention: attention, LoraTarget.experts: experts}
    per_layer = sum(per_target[target] for target in set(train.lora.targets))
    return float(per_layer * len(adapted_layers(train.lora, s.num_hidden_layers)))


def forward(model: Model, tokens: float, context: float, *, width: int, is_packed: bool) -> Work:
    """Count the work of a forward pass over `tokens` tokens. It reads all weights once, as many tokens use all experts.

    Args:
        model: sizes of the model.
        tokens: tokens of the pass.
        context: tokens that a token attends to, on average. It is half the length of an example.
        width: bytes of a value in matrix products.
        is_packed: whether the experts are packed. They are read, decoded and read again: 17/32 + 2·width bytes a value.
    """
    experts = _PACKED_BYTES + 2 * width if is_packed else width
    return Work(
        flops=tokens * model.forward(context),
        memory_bytes=model.expert_values * experts + model.dense_values * width,
    )


def training_pass(
    model: Model,
    train: TrainConfig,
    tokens: float,
    context: float,
    *,
    is_packed: bool,
    rounds: bool,
    has_teacher: bool,
) -> Work:
    """Count the work of one forward and backward pass on one device. Other arguments are those of `forward`.

    With F FLOPs for a forward pass, the input gradients take F again. The weight gradients take 2 FLOPs per token and
    trained active value. Gradient checkpointing repeats the forward pass, except the head. A teacher adds F.
    QAT rounds the expert weights that change in every forward pass (2·width bytes per value). Adapters on rounded
    experts first add their product to the base: 2·r FLOPs per value.

    Args:
        rounds: whether expert weights that change are rounded in the forward pass (QAT).
        has_teacher: whether a teacher predicts the same tokens.
    """
    width = compute_width(train)
    once = forward(model, tokens, context, width=width, is_packed=is_packed)
    again = int(train.gradient_checkpointing)
    head = 2 * model.shape.hidden_size * model.shape.vocab_size * tokens
    trained = {
        Method.full: model.active_values,
        Method.bf16_parts: model.dense_values,
        Method.lora: 0,
    }[train.method]
    adapters = (3 + again) * 2 * adapter_values(model, train)
    total = once.times(2 + again + has_teacher) + Work(flops=tokens * (2 * trained + adapters) - again * head)
    total += Work(memory_bytes=_cast_bytes(model, train, is_packed=is_packed) * (2 + again))
    if rounds:
        total += _rounding(model, train).times(1 + again)
    return total


def _cast_bytes(model: Model, train: TrainConfig, *, is_packed: bool) -> float:
    """Bytes per pass to cast FP32 weights to BF16 (mixed_bf16): 4 to read and 2 to write per value."""
    if train.precision is not Precision.mixed_bf16:
        return 0.0
    values = model.dense_values + (0 if is_packed else model.expert_values)
    return float(values * (bytes_per_value(TRAIN_TYPES[train.precision]) + _BF16_BYTES))


def _rounding(model: Model, train: TrainConfig) -> Work:
    """Work to round the changing experts once."""
    share = 1.0 if train.method is Method.full else 0.0
    if train.method is Method.lora and LoraTarget.experts in train.lora.targets:
        layers = model.shape.num_hidden_layers
        share = len(adapted_layers(train.lora, layers)) / layers
    values = share * model.expert_values
    rank = train.lora.rank if train.method is Method.lora else 0
    return Work(flops=2 * rank * values, memory_bytes=2 * compute_width(train) * values)


def gptq(model: Model, tokens: float, context: float, *, is_packed: bool) -> Work:
    """Count the work of GPTQ on `tokens` calibration tokens.

    Two forward passes: one for the inputs, one through the rounded layer. The Hessians take 2·K·(H² + I²) FLOPs per
    token and layer. Per expert, the inverses take about 2·(H³ + I³), and the updates out·in² (3·H²·I if H = I).
    Hessians, inverses and updates are FP32.
    """
    s, k = model.shape, model.experts_per_token
    hidden, inner = s.hidden_size, s.intermediate_size
    hessians = tokens * s.num_hidden_layers * 2 * k * (hidden**2 + inner**2)
    experts = s.num_hidden_layers * s.num_local_experts
    solves = experts * (2 * (hidden**3 + inner**3) + 2 * inner * hidden**2 + hidden * inner**2)
    passes = forward(model, tokens, context, width=_BF16_BYTES, is_packed=is_packed).times(2)
    return passes + Work(fp32_flops=hessians + solves)


def generation(
    model: Model, answers: int, *, batch_size: int, new_tokens: int, context: float, width: int, is_packed: bool
) -> Work:
    """Count the work to generate `answers` answers of `new_tokens` tokens each. Reading the weights dominates it.

    Each step of a batch of B answers reads the dense weights, the experts that its tokens choose, and the keys and
    values of its contexts: 2·L·G·D values per token. B tokens choose E·(1 - (1 - K/E)^B) experts of a layer on average,
    if all experts are equally likely.

    Args:
        context: tokens of a prompt, and half of the answer.
        width, is_packed: as for `forward`.
    """
    s, batch = model.shape, min(batch_size, max(answers, 1))
    steps = -(-answers // batch) * new_tokens
    share = 1 - (1 - model.experts_per_token / s.num_local_experts) ** batch
    experts = share * model.expert_values * (_PACKED_BYTES + 2 * width if is_packed else width)
    cache = batch * context * 2 * s.num_hidden_layers * s.num_key_value_heads * s.head_dim * width
    read = model.dense_values * width + experts + cache
    return Work(flops=answers * new_tokens * model.forward(context), memory_bytes=steps * read)
