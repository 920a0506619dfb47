"""Checks the values of the keys of a gpt-oss config.json.

transformers accepts many wrong values, and fails on others late or with a traceback. A key that is absent has its
default, and keys that are not listed here are not checked. `Shape.of` checks the sizes first.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from packaging.version import InvalidVersion, Version

from pipeline.checkpoints.dtypes import STORED_TYPES
from pipeline.config.bounds import Bound

MOST_LAYERS = 1 << 12
MOST_EXPERTS = 1 << 14
MOST_WIDTH = 1 << 20
"""Largest sizes that are read. They are far above those of any model, and a model of these sizes has fewer than 2^63
bytes."""


def _is_whole(value: object, least: int = 1, most: int = 1 << 31) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_ids(value: object) -> bool:
    return value is None or all(_is_whole(each, 0) for each in (value if isinstance(value, list) else [value]))


def _number(meaning: str, holds: Callable[[float], bool]) -> Bound:
    return Bound(meaning, lambda value: _is_number(value) and holds(value))


_WHOLE = Bound("a positive whole number", _is_whole)
_POSITIONS = Bound("a positive whole number, at most 16777216", lambda value: _is_whole(value, 1, 1 << 24))
_TRUTH = Bound("true or false", lambda value: type(value) is bool)


def _is_version_or_null(value: object) -> bool:
    """Return whether transformers can parse a version, which it does when it loads a tokenizer."""
    try:
        return value is None or bool(Version(value))  # type: ignore[arg-type]
    except (InvalidVersion, TypeError):
        return False


_POSITIVE = _number("a number greater than 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("a number, 0 or more", lambda value: value >= 0)
_TEXT = Bound("text", lambda value: isinstance(value, str))
_IDS = Bound("a token id, a list of token ids, or null", _is_ids)
_OBJECT = Bound("an object or null", lambda value: value is None or isinstance(value, dict))
_TEXTS = Bound(
    "a list of text or null",
    lambda value: value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value)),
)
_TYPES = [kind.name for kind in STORED_TYPES.values()]
_DTYPE = Bound("the name of a type, such as bfloat16", lambda value: value is None or value in _TYPES)

_KEYS = {
    "architectures": _TEXTS,
    "attention_bias": Bound("true, because gpt-oss has these biases", lambda value: value is True),
    "attention_dropout": _number("a number, 0 or more and below 1", lambda value: 0 <= value < 1),
    "bos_token_id": _IDS,
    "dtype": _DTYPE,
    "eos_token_id": _IDS,
    "experts_per_token": _WHOLE,
    "hidden_act": Bound("silu", lambda value: value == "silu"),
    "initial_context_length": _POSITIONS,
    "initializer_range": _NOT_NEGATIVE,
    "max_position_embeddings": _POSITIONS,
    "num_experts_per_tok": _WHOLE,
    "output_router_logits": _TRUTH,
    "pad_token_id": Bound("a token id or null", lambda value: value is None or _is_whole(value, 0)),
    "quantization_config": _OBJECT,
    "rms_norm_eps": _POSITIVE,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "rope_theta": _POSITIVE,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "sliding_window": _WHOLE,
    "swiglu_limit": _POSITIVE,
    "tie_word_embeddings": Bound("false, because gpt-oss has its own lm_head", lambda value: value is False),
    "torch_dtype": _DTYPE,
    "transformers_version": Bound("a version such as 4.55.0, or null", _is_version_or_null),
    "use_cache": _TRUTH,
}

_RELEASED_ROPE_KEYS = {
    "beta_fast": _POSITIVE,
    "beta_slow": _POSITIVE,
    "factor": _number("a number, 1 or more", lambda value: value >= 1),
    "original_max_position_embeddings": _POSITIONS,
    "rope_type": _TEXT,
    "truncate": _TRUTH,
}
ROPE_KEYS = tuple(_RELEASED_ROPE_KEYS)
"""Keys of `rope_scaling` in the released models. transformers 5 writes them as `rope_parameters`, with `rope_theta`."""
_ROPE_KEYS = {**_RELEASED_ROPE_KEYS, "attention_factor": _POSITIVE, "rope_theta": _POSITIVE, "type": _TEXT}
_ACTIVE = ("num_experts_per_tok", "experts_per_token")


def list_wrong_keys(config: Mapping[str, object], attention_types: tuple[str, ...]) -> list[str]:
    """Return one message for each key with a wrong value, without the path of the file.

    Args:
        config: the content of config.json. Its sizes are whole numbers.
        attention_types: the types of layers that `layer_types` may list.
    """
    found = [*_wrong(config, _KEYS, "")]
    for section in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := config.get(section), dict):
            found += _wrong(rope, _ROPE_KEYS, f"{section}.")
    return [*found, *_contradictions(config, attention_types)]


def _wrong(values: Mapping[str, object], bounds: Mapping[str, Bound], prefix: str) -> Iterator[str]:
    for key, bound in bounds.items():
        if key in values and not bound.holds(values[key]):
            yield f"{prefix}{key}={values[key]!r:.80}: must be {bound.meaning}."


def _contradictions(config: Mapping[str, object], attention_types: tuple[str, ...]) -> Iterator[str]:
    experts, layers = config["num_local_experts"], config["num_hidden_layers"]
    for key in _ACTIVE:
        active = config.get(key)
        if type(active) is int and type(experts) is int and active > experts:
            yield f"{key}={active}: a token cannot choose more than num_local_experts={experts} experts."
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if type(heads) is int and type(groups) is int and heads % groups:
        yield f"num_attention_heads={heads}: must be a multiple of num_key_value_heads={groups}."
    if type(size := config["head_dim"]) is int and size % 2:
        yield f"head_dim={size}: must be even, because RoPE turns pairs."
    vocabulary = cast(int, config["vocab_size"])
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = config.get(key)
        if any(each >= vocabulary for each in (ids if isinstance(ids, list) else [ids]) if type(each) is int):
            yield f"{key}={ids!r:.80}: must be less than vocab_size={vocabulary}."
    types = config.get("layer_types")
    if "layer_types" in config and not (isinstance(types, list) and all(each in attention_types for each in types)):
        yield f"layer_types={types!r:.80}: must be a list of {' and '.join(attention_types)}."
    elif isinstance(types, list) and len(types) != layers:
        yield f"layer_types: has {len(types)} layers, but num_hidden_layers={layers}."
