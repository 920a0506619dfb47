"""Writes OpenAI's original layout, which OpenAI's reference code loads.

The layout stores the same bytes as the Hugging Face layout, under other names. Queries, keys and values share one
tensor. The layout was taken from the loader of gpt-oss 0.0.9 (`gpt_oss/torch/weights.py`, `gpt_oss/torch/model.py`).
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import (
    ATTENTION,
    ATTENTION_NORM,
    ATTENTION_PROJECTIONS,
    DOWN,
    EMBEDDING,
    EXPERT_BIASES,
    EXPERTS,
    FINAL_NORM,
    GATE_UP,
    HEAD,
    MLP_NORM,
    ROUTER,
    SINKS,
    ExpertProjection,
    Shape,
    TensorInfo,
    expert_projections,
    in_layer,
    other_tensors,
)
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Written
from pipeline.errors import UserError
from pipeline.export.exporter import Exporter
from pipeline.export.job import Job
from pipeline.export.layout import Held, Layout, packed_stack
from pipeline.export.mxfp4 import legacy_config, rope_scaling
from pipeline.export.weights import open_base, others_piece, packed_piece, stacks, write_checkpoint
from pipeline.runs.artifacts import Kind

_STACKS = {GATE_UP: "mlp1_weight", DOWN: "mlp2_weight"}
_QUERY, _KEY, _VALUE, _OUT = (f"{ATTENTION}.{name}" for name in ATTENTION_PROJECTIONS)
_OF_MODEL = {
    "embedding.weight": EMBEDDING,
    "norm.scale": FINAL_NORM,
    "unembedding.weight": HEAD,
}
_OF_LAYER: dict[str, tuple[str, ...]] = {
    "attn.norm.scale": (ATTENTION_NORM,),
    "attn.sinks": (f"{ATTENTION}.{SINKS}",),
    "attn.qkv.weight": tuple(f"{name}.weight" for name in (_QUERY, _KEY, _VALUE)),
    "attn.qkv.bias": tuple(f"{name}.bias" for name in (_QUERY, _KEY, _VALUE)),
    "attn.out.weight": (f"{_OUT}.weight",),
    "attn.out.bias": (f"{_OUT}.bias",),
    "mlp.norm.scale": (MLP_NORM,),
    "mlp.gate.weight": (f"{ROUTER}.weight",),
    "mlp.gate.bias": (f"{ROUTER}.bias",),
    "mlp.mlp1_bias": (f"{EXPERTS}.{EXPERT_BIASES[0]}",),
    "mlp.mlp2_bias": (f"{EXPERTS}.{EXPERT_BIASES[1]}",),
}
_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length",
    "rope_theta": "rope_theta",
}
_ROPE_KEYS = {"rope_scaling_factor": "factor", "rope_ntk_alpha": "beta_slow", "rope_ntk_beta": "beta_fast"}


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: see `mxfp4.write`. Also raised if config.json lacks a key.
    """
    base = open_base(job)
    config = original_config(base.config, job.source.directory)
    pieces = [others_piece(job, base, target, sources) for target, sources in other_names(base.shape).items()]
    pieces += [packed_piece(each, *stack_names(each.projection)) for each in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces=pieces, config=config)


def other_names(shape: Shape) -> dict[str, tuple[str, ...]]:
    """Map each stored tensor to the Hugging Face tensors that it concatenates. Expert weights are not included."""
    names: dict[str, tuple[str, ...]] = {target: (source,) for target, source in _OF_MODEL.items()}
    for layer in range(shape.num_hidden_layers):
        for target, sources in _OF_LAYER.items():
            names[f"block.{layer}.{target}"] = tuple(in_layer(layer, source) for source in sources)
    return names


def stack_names(projection: ExpertProjection) -> tuple[str, str]:
    """Return the names of the blocks and scales of a stack of experts."""
    name = f"block.{projection.layer}.mlp.{_STACKS[projection.kind]}"
    return f"{name}.blocks", f"{name}.scales"


def layout(shape: Shape) -> Layout:
    """Map each plain tensor to its stored tensors. Queries, keys and values are rows of `attn.qkv`."""
    infos, held = other_tensors(shape), {}
    for target, sources in other_names(shape).items():
        rows, first = sum(infos[source].shape[0] for source in sources), 0
        for source in sources:
            info = TensorInfo(infos[source].dtype, (rows, *infos[source].shape[1:]))
            held[source] = Held({target: info}, first=first)
            first += infos[source].shape[0]
    return held | {each.name: packed_stack(each, *stack_names(each)) for each in expert_projections(shape)}


def describe(base: Checkpoint, _: Collection[str]) -> dict[str, object]:
    """Return the content of config.json."""
    return original_config(base.config, base.directory)


def original_config(config: Mapping[str, object], where: Path) -> dict[str, object]:
    """Return the content of config.json for OpenAI's reference code. `where` is the directory of the base model.

    Raises:
        UserError: a required key is missing.
    """
    legacy = {**config, **legacy_config(config)}
    scaling = rope_scaling(legacy)
    values = {key: legacy.get(source) for key, source in _KEYS.items()}
    values |= {key: scaling.get(source) for key, source in _ROPE_KEYS.items()}
    missing = [{**_KEYS, **_ROPE_KEYS}[key] for key, value in values.items() if value is None]
    if missing:
        raise UserError(f"{where / CONFIG}: has no {', '.join(missing)}. export.target=openai needs it.")
    return values


EXPORTER = Exporter(
    write=write, kind=Kind.foreign, layout=layout, describe=describe, check_source=original_config, mark="block."
)
