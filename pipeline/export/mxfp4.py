"""Writes the Hugging Face layout of openai/gpt-oss: MXFP4 experts, and all other tensors in BF16.

The content of config.json comes from the source (see `released_config`).
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.checkpoints.config_keys import ROPE_KEYS
from pipeline.checkpoints.gpt_oss import (
    ARCHITECTURE,
    ATTENTION_TYPES,
    BLOCKS_SUFFIX,
    QUANTIZATION_CONFIG,
    other_tensors,
)
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Written
from pipeline.export.exporter import Exporter
from pipeline.export.job import Job
from pipeline.export.layout import packed_layout
from pipeline.export.weights import open_base, others_piece, packed_piece, stacks, write_checkpoint
from pipeline.runs.artifacts import Kind

_DIALECT = ("rope_parameters", "dtype", "torch_dtype")


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: a weight is NaN or Inf, the block size does not divide an input dimension, or the sizes of the model
            and the source differ. The message names the tensor, expert and block.
    """
    base = open_base(job)
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [packed_piece(each, each.projection.blocks, each.projection.scales) for each in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces=pieces, config=released_config(base.config))


def describe(base: Checkpoint, _: Collection[str]) -> dict[str, object]:
    """Return the content of config.json."""
    return released_config(base.config)


def released_config(config: dict[str, object]) -> dict[str, object]:
    """Make the export's config.json from the source's config.json.

    The configuration of a released model is not changed. Another source gets the architecture, the quantization config
    and the rope keys of the released models, and the keys that only some engines read.
    """
    return {**legacy_config(config), "quantization_config": QUANTIZATION_CONFIG}


def legacy_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return a copy of a configuration. It has the keys that engines read, and no data type.

    Trainers write the name of a wrapper, such as FSDPGptOssForCausalLM, as the architecture. transformers 5 writes
    `rope_parameters`, but engines read `rope_scaling` and `rope_theta`.
    """
    legacy = {key: value for key, value in config.items() if key not in _DIALECT}
    legacy["architectures"] = [ARCHITECTURE]
    rope = {**rope_scaling(config), **rope_scaling(config, "rope_parameters")}
    if rope:
        legacy["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 150000))
        legacy["rope_scaling"] = {key: value for key, value in rope.items() if key in ROPE_KEYS}
    filled = _engine_keys(legacy)
    return filled | {key: value for key, value in legacy.items() if key not in filled}


def _engine_keys(config: Mapping[str, object]) -> dict[str, object]:
    """Return keys that are absent or null, with the values that transformers takes for them.

    Models that were not made from a released one may lack keys that only some engines read, and others have a default.
    """
    layers = config.get("num_hidden_layers")
    keys = {
        "experts_per_token": config.get("num_experts_per_tok"),
        "initial_context_length": rope_scaling(config).get("original_max_position_embeddings"),
        "layer_types": [ATTENTION_TYPES[i % 2] for i in range(layers)] if isinstance(layers, int) else None,
        "attention_bias": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    }
    return {key: value for key, value in keys.items() if value is not None and config.get(key) is None}


def rope_scaling(config: Mapping[str, object], key: str = "rope_scaling") -> Mapping[str, object]:
    """Return the `rope_scaling` of a configuration, or an empty mapping. `key` may name the newer form."""
    scaling = config.get(key)
    return scaling if isinstance(scaling, Mapping) else {}


EXPORTER = Exporter(write=write, kind=Kind.packed, layout=packed_layout, describe=describe, mark=BLOCKS_SUFFIX)
