"""Count the FLOPs and the bytes of memory traffic of forward and backward passes, GPTQ and generation.

All formulas are here. The counts cover matrix products, attention, weights, gradients and, with eager attention, the
scores. Other activations, norms and communication between GPUs are left out. `speeds` has the speed of a device.

Legend: L = layers, H = hidden size, I = intermediate size, V = vocabulary, N = query heads, G = key-value heads,
D = head dimension, E = experts of a layer, K = experts per token, r = rank of the adapters, T = tokens of a row.
"""

from dataclasses import dataclass

from pipeline.checkpoints.dtypes import TRAIN_TYPES, bytes_per_value
from pipeline.checkpoints.gpt_oss import GptOssJson, Shape
from pipeline.config import LoraTarget, Method, Precision, TrainConfig, adapted_layers
from pipeline.doctor.activations import compute_width
from pipeline.models import attention
from pipeline.numerics.formats import MXFP4

_PACKED_BYTES = MXFP4.bits_per_value / 8
_FULL_ATTENTION = "full_attention"
_FP32_BYTES, _BF16_BYTES = bytes_per_value("F32"), bytes_per_value("BF16")
_GATE_UP_SHARE = 2 / 3
"""Share of an expert's values in gate-up: 2·H·I of 3·H·I."""
_FUSED_BACKWARD = 2.5
"""Backward FLOPs of fused attention per forward FLOP: 5 products to 2. Source: FlashAttention-2, arXiv 2307.08691."""
_EAGER_BACKWARD = 2.0
"""The same for eager attention. It stores the scores, so it does not compute them again: 4 products to 2."""
_SCORE_COPIES = 13
"""How often eager attention reads or writes a tensor of all scores in a forward pass, and again in a backward pass.

This counts the operations of transformers' `eager_attention_forward` for gpt-oss: two products, scaling, mask,
concatenation with the sinks, maximum, subtraction, softmax.
"""
_HEAD_PRODUCTS = 3
"""Products with the head in training. TRL's fused head (`trl.kernels.chunked_logprob`) computes the logits again in the
backward pass, and then the gradient of the hidden states."""


@dataclass(frozen=True)
class Work:
    """What a device has to do.

    Attributes:
        flops: floating-point operations of matrix products in BF16. A multiply-add counts as 2.
        fp32_flops: the same in FP32. The program leaves TF32 off, so tensor cores do not speed FP32 up.
        memory_bytes: bytes that the device reads from its memory and writes to it.
        disk_bytes: bytes that are read from disk and written to it.
    """

    flops: float = 0.0
    fp32_flops: float = 0.0
    memory_bytes: float = 0.0
    disk_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    def in_fp32(self) -> "Work":
        """Return this work with all products in FP32."""
        return Work(0.0, self.flops + self.fp32_flops, self.memory_bytes, self.disk_bytes)

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
    def of(cls, config: GptOssJson, where: object) -> "Model":
        """Read the sizes from the content of config.json. Without `layer_types`, every layer has full attention."""
        shape = Shape.of(config, where)
        types = config.get("layer_types") or [_FULL_ATTENTION] * shape.num_hidden_layers
        full, window = types.count(_FULL_ATTENTION), config.get("sliding_window") or 0
        return cls(shape, config["num_experts_per_tok"], full, window)

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
    def router_values(self) -> int:
        """Values of the routers: L·H·E."""
        s = self.shape
        return s.num_hidden_layers * s.hidden_size * s.num_local_experts

    @property
    def head_values(self) -> int:
        """Values of the head: H·V."""
        return self.shape.hidden_size * self.shape.vocab_size

    @property
    def dense_values(self) -> int:
        """Values that each token is multiplied by, beside its experts: attention, routers and head."""
        return self.attention_values + self.router_values + self.head_values

    @property
    def chosen_values(self) -> int:
        """Values of the K experts of a token, in all layers."""
        return self.expert_values * self.experts_per_token // self.shape.num_local_experts

    @property
    def active_values(self) -> int:
        """Values that each token is multiplied by. 3.6 × 10^9 for gpt-oss-20b, as its model card says.

        This leaves out the embedding, which is only looked up.
        """
        return self.dense_values + self.chosen_values

    def visible(self, length: float, kernel: str) -> float:
        """Return the number of keys that a query is multiplied by, on average over a row and summed over the layers.

        Eager attention multiplies by all T keys of the row and masks some. Other kernels skip the keys that a query
        does not see: T/2 are left, and in a layer with window w < T they are w - w²/(2·T).

        Args:
            length: tokens of a row, T.
            kernel: name of the attention implementation.
        """
        if kernel == attention.EAGER:
            return self.shape.num_hidden_layers * length
        window = min(self.window, length)
        others = self.shape.num_hidden_layers - self.full_layers
        return self.full_layers * length / 2 + others * (window - window**2 / (2 * length) if length else 0)

    def scores(self, keys: float) -> float:
        """FLOPs per token of the attention scores and of the sum over values: 4·N·D per visible key."""
        return 4 * self.shape.num_attention_heads * self.shape.head_dim * keys

    def experts_read(self, tokens: float, *, is_packed: bool) -> float:
        """Return the values of the experts that a forward pass over `tokens` tokens reads.

        If all experts are equally likely, the tokens choose E·(1 - (1 - K/E)^tokens) experts of a layer on average.
        Packed experts are decoded for each row, tokens·K of them, or all E if that is fewer (`packed_passes`).
        """
        count, chosen = self.shape.num_local_experts, self.experts_per_token
        share = min(1, tokens * chosen / count) if is_packed else 1 - (1 - chosen / count) ** tokens
        return self.expert_values * share


@dataclass(frozen=True)
class Batch:
    """The rows of one pass of one device.

    Attributes:
        tokens: tokens of all rows, with padding.
        length: tokens of a row, with padding. For packed documents: of a document, unless the kernel is eager.
        kernel: name of the attention implementation.
        predicted: share of the tokens whose logits are computed.
    """

    tokens: float
    length: float
    kernel: str = attention.FUSED_SINKS
    predicted: float = 1.0


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


def forward(model: Model, batch: Batch, *, width: int, is_packed: bool) -> Work:
    """Count the work of a forward pass: 2 FLOPs per token and active value, and the scores. It reads each weight once.

    Args:
        model: sizes of the model.
        batch: the rows of the pass.
        width: bytes of a value in matrix products. 4 stands for FP32.
        is_packed: whether the experts are packed. They are read, decoded and read again: 17/32 + 2·width bytes a value.
    """
    dense = model.attention_values + model.router_values + batch.predicted * model.head_values
    keys = model.visible(batch.length, batch.kernel)
    experts = model.experts_read(batch.tokens, is_packed=is_packed) * _expert_bytes(width, is_packed=is_packed)
    done = Work(
        flops=batch.tokens * (2 * (dense + model.chosen_values) + model.scores(keys)),
        memory_bytes=experts + model.dense_values * width + _score_bytes(model, batch, width),
    )
    return done.in_fp32() if width == _FP32_BYTES else done


def _expert_bytes(width: int, *, is_packed: bool) -> float:
    """Bytes to use an expert's value once."""
    return _PACKED_BYTES + 2 * width if is_packed else width


def _score_bytes(model: Model, batch: Batch, width: int) -> float:
    """Bytes that eager attention reads and writes for its scores in a forward pass. Fused kernels store no scores."""
    if batch.kernel != attention.EAGER:
        return 0.0
    heads = model.shape.num_attention_heads * model.visible(batch.length, batch.kernel)
    return _SCORE_COPIES * width * batch.tokens * heads


def training_pass(
    model: Model, train: TrainConfig, batch: Batch, *, is_packed: bool, rounds: bool, has_teacher: bool
) -> Work:
    """Count the work of one forward and backward pass on one device. Other arguments are those of `forward`.

    - Projections and plain experts: a forward pass takes F FLOPs. The gradients of the inputs take F again, and so does
      the forward pass that gradient checkpointing repeats.
    - Packed experts: 8/3·F with and without checkpointing. The forward pass is not repeated. The backward pass
      multiplies by gate-up again (2/3·F), and computes the gradients of the inputs (`packed_passes.Pass.backward`).
    - Attention: `_FUSED_BACKWARD` or `_EAGER_BACKWARD`. The head: `_HEAD_PRODUCTS`.
    - Gradients of weights: 2 FLOPs per token and trained active value.
    - A teacher adds a forward pass. QAT rounds the expert weights that change, in every forward pass.

    Args:
        rounds: whether expert weights that change are rounded in the forward pass (QAT).
        has_teacher: whether a teacher predicts the same tokens.
    """
    width, again = compute_width(train), int(train.gradient_checkpointing)
    total = _products(model, train, batch, is_packed=is_packed)
    total += Work(memory_bytes=_weight_bytes(model, train, batch, is_packed=is_packed))
    total += Work(memory_bytes=(2 + again) * _score_bytes(model, batch, width))
    if has_teacher:
        total += forward(model, batch, width=width, is_packed=is_packed)
    if rounds:
        total += _rounding(model, train).times(2 if is_packed else 1 + again)
    return total.in_fp32() if train.precision is Precision.fp32 else total


def _products(model: Model, train: TrainConfig, batch: Batch, *, is_packed: bool) -> Work:
    """Count the FLOPs of `training_pass`, without rounding and teacher."""
    again = int(train.gradient_checkpointing)
    projections, head = model.attention_values + model.router_values, batch.predicted * model.head_values
    trained = {
        Method.full: projections + head + model.chosen_values,
        Method.bf16_parts: projections + head,
        Method.lora: 0.0,
    }[train.method]
    backward = _EAGER_BACKWARD if batch.kernel == attention.EAGER else _FUSED_BACKWARD
    values = (
        (2 + again) * projections
        + (2 + _GATE_UP_SHARE if is_packed else 2 + again) * model.chosen_values
        + _HEAD_PRODUCTS * head
        + (3 + again) * adapter_values(model, train)
        + trained
    )
    scores = (1 + again + backward) * model.scores(model.visible(batch.length, batch.kernel))
    return Work(flops=batch.tokens * (2 * values + scores))


def _weight_bytes(model: Model, train: TrainConfig, batch: Batch, *, is_packed: bool) -> float:
    """Bytes of weights in `training_pass`: each product reads them once.

    Packed experts are decoded in the forward and in the backward pass. The latter reads gate-up once more. With
    mixed_bf16, each forward pass casts the FP32 weights: 4 bytes to read and 2 to write per value.
    """
    width, again = compute_width(train), int(train.gradient_checkpointing)
    experts = model.experts_read(batch.tokens, is_packed=is_packed)
    projections = (2 + again) * width * (model.attention_values + model.router_values)
    if is_packed:
        read = experts * (2 * _expert_bytes(width, is_packed=True) + _GATE_UP_SHARE * width)
    else:
        read = experts * (2 + again) * width
    cast = model.dense_values + (0 if is_packed else model.expert_values)
    cast_bytes = bytes_per_value(TRAIN_TYPES[train.precision]) + _BF16_BYTES
    is_cast = train.precision is Precision.mixed_bf16
    return projections + read + _HEAD_PRODUCTS * width * model.head_values + is_cast * (1 + again) * cast * cast_bytes


def _rounding(model: Model, train: TrainConfig) -> Work:
    """Work to round the changing experts once."""
    share = 1.0 if train.method is Method.full else 0.0
    if train.method is Method.lora and LoraTarget.experts in train.lora.targets:
        layers = model.shape.num_hidden_layers
        share = len(adapted_layers(train.lora, layers)) / layers
    values = share * model.expert_values
    rank = train.lora.rank if train.method is Method.lora else 0
    return Work(flops=2 * rank * values, memory_bytes=2 * compute_width(train) * values)


def optimizer_step(*, gradient_bytes: float, state_bytes: float, passes: float, shards: int) -> Work:
    """Count the traffic of an optimizer step on one device, and of the gradients of its passes.

    Each pass writes its gradients and adds them to the sum: it writes two values and reads two. Then the step reads the
    sum and the weights, writes the weights, and reads and writes the states. Gradients have the type of the weights.

    Args:
        gradient_bytes, state_bytes: bytes of all gradients and of all states.
        passes: passes of each device in a step.
        shards: number of devices that divide the optimizer between them. 1 if each device updates all weights.
    """
    return Work(memory_bytes=4 * passes * gradient_bytes + (3 * gradient_bytes + 2 * state_bytes) / shards)


def gptq(model: Model, tokens: float) -> Work:
    """Count the work of GPTQ on `tokens` calibration tokens, without the forward passes.

    The Hessians take 2·K·(H² + I²) FLOPs per token and layer. Per expert, the inverses take about 2·(H³ + I³), and the
    updates out·in² (3·H²·I if H = I). All is FP32.
    """
    s, k = model.shape, model.experts_per_token
    hidden, inner = s.hidden_size, s.intermediate_size
    hessians = tokens * s.num_hidden_layers * 2 * k * (hidden**2 + inner**2)
    experts = s.num_hidden_layers * s.num_local_experts
    solves = experts * (2 * (hidden**3 + inner**3) + 2 * inner * hidden**2 + hidden * inner**2)
    return Work(fp32_flops=hessians + solves)


def generation(
    model: Model, answers: int, *, batch_size: int, new_tokens: int, prompt: Batch, width: int, is_packed: bool
) -> Work:
    """Count the work to generate `answers` answers of `new_tokens` tokens each. Reading the weights dominates it.

    Each batch reads its prompts in one pass. Then each step reads the dense weights, the experts that its B tokens
    choose (`Model.experts_read`), and the cache: 2·G·D values per visible token and layer. transformers' DynamicCache
    copies it (2 accesses). Its eager attention reads it once, and writes and reads a copy for each of the N/G query
    heads that share a key head.

    Args:
        prompt: the prompts of a batch. Its `kernel` reads them. Steps always use eager attention.
        width, is_packed: as for `forward`.
    """
    s, size = model.shape, min(batch_size, max(answers, 1))
    batches = -(-answers // size)
    context = prompt.length + new_tokens / 2
    others = s.num_hidden_layers - model.full_layers
    keys = model.full_layers * context + others * min(context, model.window)
    accesses = 3 + 2 * s.num_attention_heads / s.num_key_value_heads
    cache = size * keys * 2 * s.num_key_value_heads * s.head_dim * accesses
    experts = model.experts_read(size, is_packed=is_packed) * _expert_bytes(width, is_packed=is_packed)
    step = Work(
        flops=size * (2 * model.active_values + model.scores(keys)),
        memory_bytes=width * (model.dense_values + cache) + experts,
    )
    steps = (step.in_fp32() if width == _FP32_BYTES else step).times(batches * new_tokens)
    return steps + forward(model, prompt, width=width, is_packed=is_packed).times(batches)
