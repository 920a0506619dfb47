"""Checks the configuration of an export: config.json, generation_config.json, tokenizer and chat template.

The expected values do not come from the code that writes exports. The number format is stated here, the constants in
`checkpoints.released`, and the ids in the tokenizer. All other keys, such as sizes, must equal the base model's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.gpt_oss import Shape, TensorInfo
from pipeline.checkpoints.released import (
    ARCHITECTURES,
    CONSTANTS,
    RETURN,
    has_chat_template,
    layer_types,
    rope_of,
    stop_problems,
    token_ids,
)
from pipeline.checkpoints.side_files import TOKENIZER, TOKENIZER_CONFIG

RELEASED_TARGETS = ("mxfp4", "nvfp4", "bf16")
"""Targets whose config.json has the form of the released models."""
_WITHOUT_MEANING = ("transformers_version", "_name_or_path", "producer")
_DIALECT = ("rope_parameters", "dtype", "torch_dtype", "quantization_config")  # keys that the export writes anew
_KEPT_PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
_ABSENT = object()
_LONGEST = 80  # characters of a value in a message; longer values are truncated


@dataclass(frozen=True)
class Statement:
    """A value that a file of the export must have, and the value that it has. `name` is the dotted key."""

    name: str
    expected: object
    found: object

    @property
    def problem(self) -> str | None:
        """Description of the difference, or None."""
        if self.expected is _ABSENT:
            return None if self.found is _ABSENT else f"{self.name} is {_shorten(self.found)}, but must be absent"
        if self.found is _ABSENT:
            return f"{self.name} is missing, but must be {_shorten(self.expected)}"
        is_equal = isinstance(self.found, bool) is isinstance(self.expected, bool) and self.found == self.expected
        if not is_equal:
            return f"{self.name} is {_shorten(self.found)}, but must be {_shorten(self.expected)}"
        return None

    def record(self) -> dict[str, object]:
        """Return the statement as the report shows it. A value that must be absent, or is absent, is left out."""
        values = {"expected": self.expected, "found": self.found}
        return {name: value for name, value in values.items() if value is not _ABSENT}


def compare(found: Mapping[str, object], expected: Mapping[str, object], prefix: str = "") -> Iterator[Statement]:
    """Compare two configurations key by key. Keys of nested objects are dotted."""
    for key in sorted({*found, *expected} - set(_WITHOUT_MEANING)):
        have, want = found.get(key, _ABSENT), expected.get(key, _ABSENT)
        if isinstance(have, Mapping) and isinstance(want, Mapping):
            yield from compare(have, want, f"{prefix}{key}.")
        else:
            yield Statement(f"{prefix}{key}", want, have)


def expected_config(
    target: str, tensors: Mapping[str, TensorInfo], base: Mapping[str, object], tokens: Mapping[str, int]
) -> dict[str, object]:
    """State config.json of an export.

    Args:
        target: layout of the export, one of RELEASED_TARGETS.
        tensors: name -> type and shape of the export's tensors. They were checked before.
        base: config.json of the base model, as it is on disk.
        tokens: special tokens of the export's tokenizer, text -> id.
    """
    scaling, theta = rope_of(base)
    expected = {key: value for key, value in base.items() if key not in (*_DIALECT, *_WITHOUT_MEANING)}
    expected |= {**CONSTANTS, "architectures": ARCHITECTURES}
    expected |= {
        "layer_types": layer_types(Shape.of(base, CONFIG).num_hidden_layers),
        "rope_scaling": scaling,
        "rope_theta": theta,
    }
    expected |= {
        "experts_per_token": base.get("num_experts_per_tok"),
        "initial_context_length": base.get("initial_context_length") or scaling.get("original_max_position_embeddings"),
    }
    if RETURN in tokens and not isinstance(base.get("eos_token_id"), list):
        expected["eos_token_id"] = tokens[RETURN]
    return expected | _number_format(target, tensors)


def _number_format(target: str, tensors: Mapping[str, TensorInfo]) -> dict[str, object]:
    """Return the keys that tell engines how the experts are stored."""
    if target == "bf16":
        return {"dtype": "bfloat16"}
    if target == "mxfp4":
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": _KEPT_PLAIN}}
    has_inputs = any(name.endswith("_input_scale") for name in tensors)
    algorithm = "NVFP4" if has_inputs else "W4A16_NVFP4"
    bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    sides = ("input_activations", "weights") if has_inputs else ("weights",)
    return {
        "quantization_config": {
            "config_groups": {"group_0": {**dict.fromkeys(sides, bits), "targets": ["Linear"]}},
            "ignore": _KEPT_PLAIN,
            "quant_algo": algorithm,
            "quant_method": "modelopt",
        },
        "hf_quant_config.json": {
            "quantization": {
                "quant_algo": algorithm,
                "kv_cache_quant_algo": None,
                "group_size": 16,
                "exclude_modules": _KEPT_PLAIN,
            }
        },
    }


def serving_problems(directory: Path, base: Path) -> Iterator[str]:
    """Find what a server would miss: the tokenizer, the chat template, and stop tokens in generation_config.json.

    Args:
        directory: directory of the export.
        base: directory of the base model. If its generation_config.json stops at tool calls, the export's must, too.
    """
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        if not (directory / name).is_file():
            yield f"{directory / name}: missing, so servers cannot tokenize. Copy it from the base model"
    if not has_chat_template(directory):
        yield f"{directory}: has no chat template, in a file of its own or in {TOKENIZER_CONFIG}. Copy the base model's"
    yield from stop_problems(directory, base)


def statements(
    directory: Path, target: str, found: Mapping[str, object], tensors: Mapping[str, TensorInfo], base: Path
) -> list[Statement]:
    """Compare the description of an export, as its exporter reads it, with the expected values."""
    return list(compare(found, expected_config(target, tensors, read_config(base, CONFIG), token_ids(directory))))


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
