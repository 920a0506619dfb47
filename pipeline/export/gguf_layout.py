"""Reads GGUF: the names and types of tensors, the description of the model, and decoded values.

The package `gguf`, by llama.cpp's authors, defines the names and decodes the values.

Legend: E = experts, nb = blocks per row.
"""

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import (
    BIAS_SUFFIX,
    DOWN,
    EXPERT_BIASES,
    GATE_UP,
    SINKS,
    ExpertProjection,
    Shape,
    TensorInfo,
    expert_projections,
    other_tensors,
)
from pipeline.checkpoints.reading import Checkpoint
from pipeline.config.targets import TARGETS
from pipeline.data.tokenizers import Tokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.export.layout import Codes, Held, Layout, restore_signed_zeros
from pipeline.export.mxfp4 import legacy_config, rope_scaling
from pipeline.numerics.formats import MXFP4

if TYPE_CHECKING:
    from gguf import GGUFWriter as GGUFWriter  # pipeline/export/gguf.py imports this name from here
    from gguf import TensorNameMap as TensorNameMap

ARCHITECTURE = "gpt-oss"
HALF = MXFP4.block_size // 2


class GgufFile:
    """A GGUF file, read by the package `gguf`.

    Tensors are returned as uint8, with the shape (rows, ..., bytes per row).

    Attributes:
        tensors: name -> type and shape, outermost dimension first. The shape of an MXFP4 tensor counts values, not
            bytes.
        fields: the metadata of the file, key -> value.
    """

    def __init__(self, directory: Path) -> None:
        """Open the file.

        Raises:
            UserError: the directory does not have exactly one GGUF file, the file is damaged, or the package gguf is
                not installed.
        """
        gguf, found = import_gguf(), sorted(directory.glob("*.gguf"))
        if len(found) != 1:
            raise UserError(
                f"{directory}: has {len(found)} files *.gguf, but must have one (split files are not supported)."
            )
        try:
            reader = gguf.GGUFReader(found[0])
        except (ValueError, KeyError, IndexError, OverflowError) as error:
            raise UserError(f"{found[0]}: damaged or truncated ({error}). Export it again.") from error
        self._data = {each.name: each.data for each in reader.tensors}
        shapes = {each.name: tuple(int(n) for n in reversed(each.shape)) for each in reader.tensors}
        self.tensors = {each.name: TensorInfo(each.tensor_type.name, shapes[each.name]) for each in reader.tensors}
        self.fields = {name: field.contents() for name, field in reader.fields.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read the bytes of a tensor. `rows` is a slice of its first dimension."""
        data = np.array(self._data[name][rows])
        return torch.from_numpy(data.view(np.uint8).reshape(*data.shape[:-1], -1))


def layout(shape: Shape) -> Layout:
    """Map each plain tensor to its stored tensors. The package `gguf` decodes them."""
    names = tensor_names(shape)
    held = {}
    for name, info in other_tensors(shape).items():
        stored = other_tensors_of(names, name, info.shape)
        held[name] = Held(stored, decode=partial(_values, next(iter(stored.values())).dtype, dim=1))
    for projection in expert_projections(shape):
        stored = expert_tensors_of(names, projection)
        held[projection.name] = Held(stored, decode=_weights, codes=_codes)
    return held


def describe(base: Checkpoint, _: Collection[str]) -> dict[str, object]:
    """Return the metadata that the file must have. They describe the model, the tokenizer and the chat template."""
    config, tokenizer = {**base.config, **legacy_config(base.config)}, load_tokenizer(base.directory)
    given = {**config, **{f"rope_scaling.{key}": value for key, value in rope_scaling(config).items()}}
    words = {i: token for token, i in tokenizer.get_vocab().items()}
    return {
        "general.architecture": ARCHITECTURE,
        **{f"{ARCHITECTURE}.{field}": given.get(key) for field, key in _FIELDS.items()},
        f"{ARCHITECTURE}.rope.scaling.type": "yarn",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": [words.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])],
        "tokenizer.ggml.merges": _merges(tokenizer),
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def read_description(directory: Path) -> dict[str, object]:
    """Read the metadata from the file. Only the keys that `describe` returns are read."""
    fields = GgufFile(directory).fields
    of_model = ("rope.scaling.type", *_FIELDS)
    known = ("general.architecture", *(f"{ARCHITECTURE}.{key}" for key in of_model), *_OF_TOKENIZER)
    # The file stores numbers in FP32. For example, 1e-5 becomes 9.99999975e-06. Rounding restores the number that
    # config.json has.
    return {key: _round_number(fields[key]) for key in known if key in fields}


def _round_number(value: object) -> object:
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _merges(tokenizer: Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [each if isinstance(each, str) else " ".join(each) for each in merges]


def _values(type_: str, *stored: Tensor, dim: int) -> Tensor:
    """Decode stored tensors to float32. If there are two (gate and up), interleave them along `dim`."""
    import gguf.quants

    parts_ = [gguf.quants.dequantize(each.numpy(), gguf.GGMLQuantizationType[type_]) for each in stored]
    values = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts_]
    return values[0] if len(values) == 1 else torch.stack(values, dim + 1).flatten(dim, dim + 1)


def _weights(*stored: Tensor) -> Tensor:
    """Decode the stored tensors of experts to (E, out, in) float32."""
    return restore_signed_zeros(_values("MXFP4", *stored, dim=1), _codes(*stored))


def _codes(*stored: Tensor) -> Codes:
    """Convert blocks of 17 bytes to separate codes and scales, in the element order of the released layout."""
    blocks = torch.stack(stored, 2).flatten(1, 2).unflatten(-1, (-1, 1 + HALF))  # (E, out, nb, 17)
    halves = blocks[..., 1:]
    codes = torch.cat((halves & 15, halves >> 4), dim=-1)
    return Codes(codes[..., 0::2] | codes[..., 1::2] << 4, blocks[..., 0].contiguous())


def other_tensors_of(names: "TensorNameMap", source: str, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    """Return the GGUF tensors for a source tensor other than expert weights. The gate_up bias becomes two tensors."""
    module, _, kind = source.rpartition(".")
    if kind in EXPERT_BIASES:
        targets = [f"{module}.{part}.bias" for part in _PARTS[kind.removesuffix(BIAS_SUFFIX)]]
    else:
        targets = [f"{source}.weight" if kind == SINKS else source]
    dtype = "F32" if TARGETS["gguf"].is_fp32(source) else "BF16"
    info = TensorInfo(dtype, (*shape[:-1], shape[-1] // len(targets)))
    return {_name(names, target): info for target in targets}


def expert_tensors_of(names: "TensorNameMap", projection: ExpertProjection) -> dict[str, TensorInfo]:
    """Return the stored tensors of a stack of expert weights. gate_up is stored as two tensors, gate and up."""
    module, _, kind = projection.name.rpartition(".")
    parts_ = _PARTS[kind]
    info = TensorInfo("MXFP4", (projection.experts, projection.out_features // len(parts_), projection.in_features))
    return {_name(names, f"{module}.{part}.weight"): info for part in parts_}


def _name(names: "TensorNameMap", name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def tensor_names(shape: Shape) -> "TensorNameMap":
    """Return gguf's map of tensor names: name in another layout -> name in a GGUF file."""
    gguf = import_gguf()
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, shape.num_hidden_layers)


def import_gguf() -> ModuleType:
    """Import the package gguf.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import gguf

        return gguf
    except ImportError as error:
        raise UserError(
            "GGUF files need the package gguf. Install it: pip install 'gpt-oss-qat[gguf]', or pip install gguf."
        ) from error


_PARTS = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "rope_scaling.factor",
    "rope.scaling.original_context_length": "rope_scaling.original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "rope_scaling.beta_fast",
    "rope.scaling.yarn_beta_slow": "rope_scaling.beta_slow",
}
"""Key in the file, without the architecture prefix -> key of config.json.

The keys were taken from llama.cpp and not from this program's writer, so that the check is independent of the writer.
"""
_OF_TOKENIZER = (
    *(f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "merges")),
    *(f"tokenizer.ggml.{key}_token_id" for key in ("bos", "eos", "padding")),
    "tokenizer.chat_template",
)
