"""Estimate the memory of a device for runs that cannot be measured.

Weights, gradients and optimizer states are not included, because `needs` computes them.

The estimates follow the tensors that transformers' eager implementation makes. They are compared with recorded
measurements in the tests.

With gradient checkpointing, a layer keeps only its input until its backward pass. The input has B·T·H·a bytes. The
backward pass of the layer computes the activations again. The peak is in a layer's attention, in its experts, or in the
gradient of the head.

Legend: B = batch size, T = tokens of the longest example, H = hidden size, I = intermediate size, N = query heads,
K = experts per token, E = experts, a = bytes per activation.
"""

from dataclasses import dataclass

from pipeline.checkpoints.dtypes import TRAIN_TYPES, bytes_per_value
from pipeline.checkpoints.gpt_oss import Shape, expert_projections
from pipeline.config import LoraTarget, Method, Precision, TrainConfig
from pipeline.doctor.fake_gpu import FakeProperties
from pipeline.models import attention

_FP32_BYTES, _BF16_BYTES = bytes_per_value("F32"), bytes_per_value("BF16")
_SCORE_COPIES = 3  # scores, scores minus their maximum, softmax


def _capability() -> attention.Capability:
    """Return the compute capability of this machine's GPU. Without a GPU, return the capability of the fake GPU."""
    fake = FakeProperties()
    return attention.capability() or (fake.major, fake.minor)


def compute_width(train: TrainConfig) -> int:
    """Return the size of a value in matrix products, in bytes."""
    return _FP32_BYTES if train.precision is Precision.fp32 else _BF16_BYTES


def estimate(
    shape: Shape,
    train: TrainConfig,
    *,
    tokens: int,
    experts_per_token: int,
    is_quantized: bool,
    is_cast: bool,
    is_packed: bool = False,
    on_gpu: bool = True,
) -> int:
    """Estimate the peak bytes of the activations.

    Activations are the values kept for the backward pass, and the working memory of the busiest layer.

    Args:
        shape: sizes of the model.
        train: settings of the stage.
        tokens: number of tokens in a row of a batch.
        experts_per_token: number of experts that the router chooses for each token.
        is_quantized: whether fake quantizers run (QAT).
        is_cast: whether autocast casts FP32 weights. Then layers make BF16 copies of their weights, and attention
            scores are FP32. False if parameters are gathered, because sharding casts them before that.
        is_packed: whether the experts stay packed.
        on_gpu: whether the device is a GPU.
    """
    places = train.batch_size * tokens
    width = compute_width(train)
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    vectors = width * places * _vector_values(shape, experts_per_token)
    is_eager = attention.for_training(train, _capability() if on_gpu else None) == attention.EAGER
    scores = (_FP32_BYTES if is_cast else width) * is_eager * shape.num_attention_heads * tokens * places
    stacks = _decoded_bytes(shape, width, on_gpu) if is_packed else _stack_bytes(shape, train, is_quantized, is_cast)
    busiest = vectors + max(scores * _SCORE_COPIES, stacks.working)
    head = shape.vocab_size * hidden * _FP32_BYTES if train.method is not Method.lora else 0
    if train.gradient_checkpointing:
        return layers * places * hidden * width + max(busiest, head)
    return layers * (vectors + scores + stacks.kept) + max(busiest - vectors - scores, head)


def _vector_values(shape: Shape, experts_per_token: int) -> int:
    """Count the values that a layer keeps for each token.

    They are vectors of width H, values of the attention heads, and values of the experts.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    attention = 2 * shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    return 8 * hidden + attention + experts_per_token * (6 * inner + 2 * hidden)


@dataclass(frozen=True)
class _Stacks:
    """Memory for the copies of a layer's expert stacks.

    Attributes:
        kept: bytes that are kept for the backward pass.
        working: peak bytes in the backward pass.
    """

    kept: int
    working: int


def _stack_bytes(shape: Shape, train: TrainConfig, is_quantized: bool, is_cast: bool) -> _Stacks:
    """Estimate the copies of expert stacks, in addition to the weights.

    If weights are rounded or cast, a layer multiplies by a copy of them. Adapters without quantizers need no copy,
    because the layer multiplies by their factors. Adapters with quantizers also need the delta of a stack, in the type
    of the weights. The gradients of a copy have the copy's size. They are made after the delta has been freed.
    """
    values = [projection.values for projection in expert_projections(shape) if projection.layer == 0]
    width = compute_width(train)
    is_adapted = is_quantized and train.method is Method.lora and LoraTarget.experts in train.lora.targets
    is_trained = train.method is Method.full
    kept = sum(values) * width * (is_cast or is_adapted or (is_trained and is_quantized))
    gradients = sum(values) * width * (is_adapted or is_trained)
    delta = max(values) * width * is_adapted
    return _Stacks(kept, kept + max(gradients, delta))


def _decoded_bytes(shape: Shape, width: int, on_gpu: bool) -> _Stacks:
    """Estimate the decoded weights of packed experts. The backward pass holds both projections in decoded form."""
    from pipeline.models.packed_passes import DECODED_BYTES

    sizes = [projection.values * width for projection in expert_projections(shape) if projection.layer == 0]
    at_once = max(DECODED_BYTES["cuda" if on_gpu else "cpu"], max(sizes) // shape.num_local_experts)
    return _Stacks(0, int(sum(sizes) * min(1, at_once / max(sizes))))


def gathered_bytes(shape: Shape, train: TrainConfig, weights: int) -> int:
    """Estimate the bytes that gathered layers take in each process, if parameters are sharded.

    Two layers are gathered at a time: the layer that is computing, and the next one. Without `reshard_after_forward`,
    all layers stay gathered. The head stays gathered all the time. Without adapters, gradients are reduced
    in FP32 after each pass.

    Args:
        shape: sizes of the model.
        train: settings of the stage.
        weights: bytes of the model's weights.
    """
    stored = bytes_per_value(TRAIN_TYPES[train.precision])
    head = shape.vocab_size * shape.hidden_size * stored
    layer = (weights - 2 * head) // shape.num_hidden_layers
    layers = 2 if train.reshard_after_forward else shape.num_hidden_layers
    gathered = (layers * layer + head) * compute_width(train) // stored
    if train.method is Method.bf16_parts:  # the largest gradient is the head's, before and after its reduction
        return gathered + head // stored * (compute_width(train) + _FP32_BYTES)
    if train.method is not Method.full:
        return gathered
    return gathered + layer // stored * _FP32_BYTES
