"""Writes GGUF, the file format of llama.cpp, Ollama and LM Studio. MXFP4 experts are repacked without loss.

A block has 17 bytes: the scale, then 16 bytes of codes. Byte j holds element j in its low half and element j + 16 in
its high half. Gate and up are separate tensors. Vectors and the router are converted to FP32, as in llama.cpp's
converter. This conversion is exact. Other tensors are BF16.

The package `gguf` comes from llama.cpp's authors. It defines the names of the tensors and the keys of the metadata. It
also writes the header.

Legend: E = experts, nb = blocks per row.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.dtypes import torch_dtype
from pipeline.checkpoints.gpt_oss import other_tensors
from pipeline.checkpoints.shards import Piece, Written, make_parts
from pipeline.data.tokenizers import O200K_WORDS, load_tokenizer
from pipeline.errors import UserError
from pipeline.export.exporter import Exporter
from pipeline.export.gguf_layout import (
    ARCHITECTURE,
    HALF,
    GgufFile,
    describe,
    expert_tensors_of,
    import_gguf,
    layout,
    other_tensors_of,
    read_description,
    tensor_names,
)
from pipeline.export.job import Job
from pipeline.export.mxfp4 import legacy_config, rope_scaling
from pipeline.export.weights import ExpertStack, OtherTensor, Packed, open_base, stacks
from pipeline.numerics.compiled import compilation_for
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import Kind
from pipeline.runs.console import progress, warn
from pipeline.runs.disk import raise_if_disk_too_small

if TYPE_CHECKING:
    from pipeline.export.gguf_layout import GGUFWriter, TensorNameMap

FILE = "model.gguf"


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file: shape (outermost dimension first), ggml type, and size in bytes."""

    shape: tuple[int, ...]
    type: str
    bytes: int


def write(job: Job, directory: Path) -> Written:
    """Stream the model into one file in `directory`, expert by expert.

    An interrupted export cannot be resumed; the next one starts from the beginning.

    Raises:
        UserError: see `mxfp4.write`. Also raised if the package gguf is not installed, or if config.json lacks a key.
    """
    gguf = import_gguf()
    base = open_base(job)
    target = _Target(tensor_names(base.shape))
    pieces = [target.other(OtherTensor(job, base, name)) for name in other_tensors(base.shape)]
    pieces += [target.experts(stack) for stack in stacks(job, base)]
    path = directory / FILE
    temporary = path.with_name(f"{FILE}.tmp")
    start = _write_head(gguf, temporary, source=job.source.directory, config=base.config, stored=target.stored)
    raise_if_disk_too_small(directory, target.bytes)
    with compilation_for(sum(stack.projection.values for stack in stacks(job, base))):
        _write_data(temporary, pieces, target.offsets(start, gguf.GGUF_DEFAULT_ALIGNMENT), target.bytes)
    temporary.replace(path)
    return Written(target.bytes, notes=[note for piece in pieces if (note := piece.note()) is not None])


class _Target:
    """Creates the pieces of the file, and collects the tensors that the file will hold."""

    def __init__(self, names: "TensorNameMap") -> None:
        self._names = names
        self.stored: dict[str, _Stored] = {}

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.stored.values())

    def offsets(self, start: int, alignment: int) -> dict[str, int]:
        """Return the byte offset of each tensor in the file. The header ends at offset `start`."""
        found, offset = {}, _align(start, alignment)
        for name, each in self.stored.items():
            found[name] = offset
            offset = _align(offset + each.bytes, alignment)
        return found

    def other(self, tensor: OtherTensor) -> Piece:
        stored = other_tensors_of(self._names, tensor.name, tensor.info.shape)
        names, wide = list(stored), torch_dtype(next(iter(stored.values())).dtype)
        for name, info in stored.items():
            self.stored[name] = _Stored(info.shape, info.dtype, wide.itemsize * math.prod(info.shape))

        def put(values: Tensor) -> Iterator[tuple[str, Tensor]]:
            for i, name in enumerate(names):
                yield name, values[..., i :: len(names)].to(wide)

        return Piece({}, lambda: tensor.steps(put), lambda: {"tensors": names, "is_copied": tensor.is_copied})

    def experts(self, stack: ExpertStack) -> Piece:
        projection = stack.projection
        tensors = expert_tensors_of(self._names, projection)
        names, nb = list(tensors), projection.in_features // MXFP4.block_size
        for name, info in tensors.items():
            self.stored[name] = _Stored(info.shape, info.dtype, math.prod(info.shape[:-1]) * nb * (1 + HALF))

        def put(made: Packed) -> Iterator[tuple[str, Tensor]]:
            for i, name in enumerate(names):
                yield name, repack(made.blocks[:, i :: len(names)], made.scales[:, i :: len(names)])

        return Piece({}, lambda: stack.steps(put), lambda: stack.note(names))


def repack(blocks: Tensor, scales: Tensor) -> Tensor:
    """Repack uint8 blocks (E, rows, nb, 16) and scales (E, rows, nb) into the blocks of GGUF (E, rows, nb * 17)."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # (E, rows, nb, 32)
    return torch.cat((scales.unsqueeze(-1), codes[..., :HALF] | codes[..., HALF:] << 4), dim=-1).flatten(-2)


def _write_head(
    gguf: ModuleType, path: Path, *, source: Path, config: dict[str, Any], stored: dict[str, _Stored]
) -> int:
    """Write everything that precedes the data, and return its size in bytes."""
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    _describe(gguf, writer, {**config, **legacy_config(config)}, source)
    _add_tokenizer(gguf, writer, source, config["vocab_size"])
    for name, each in stored.items():
        # float16 is a placeholder. If the type were uint8, gguf would read the last dimension as a number of bytes, and
        # would convert it to a number of values.
        writer.add_tensor_info(name, each.shape, np.float16, each.bytes, gguf.GGMLQuantizationType[each.type])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path.stat().st_size


def _metadata_of(config: Mapping[str, object], source: Path) -> dict[str, Any]:
    """Return the keys of config.json that the metadata needs. Raise UserError if one is missing."""
    given = {**config, **{f"rope_scaling.{key}": value for key, value in rope_scaling(config).items()}}
    missing = [key for key in _KEYS if given.get(key) is None]
    if missing:
        raise UserError(f"{source / CONFIG}: has no {', '.join(missing)}. export.target=gguf needs it.")
    return given


def _check_source(config: Mapping[str, object], source: Path) -> None:
    import_gguf()
    _metadata_of({**config, **legacy_config(config)}, source)


def _describe(gguf: ModuleType, writer: "GGUFWriter", config: dict[str, Any], source: Path) -> None:
    given = _metadata_of(config, source)
    for key, adder in _KEYS.items():
        getattr(writer, adder)(given[key])
    writer.add_value_length(given["head_dim"])
    writer.add_expert_feed_forward_length(given["intermediate_size"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_name(source.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(gguf: ModuleType, writer: "GGUFWriter", source: Path, rows: int) -> None:
    """Add vocabulary, merges, special tokens and chat template. Embedding rows without a token get a placeholder."""
    tokenizer = load_tokenizer(source)
    pattern = re.findall(r'"Regex":\s*("(?:[^"\\]|\\.)*")', (source / "tokenizer.json").read_text(encoding="utf-8"))
    if O200K_WORDS not in [json.loads(each) for each in pattern]:
        warn(
            "export",
            "the tokenizer splits text into words by its own pattern, but readers of GGUF files use the o200k pattern.",
        )
    words = {i: token for token, i in tokenizer.get_vocab().items()}
    special = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(
        [kinds.UNUSED if i not in words else kinds.CONTROL if i in special else kinds.NORMAL for i in range(rows)]
    )
    gguf.SpecialVocab(source, load_merges=True).add_to_gguf(writer, quiet=True)


def _write_data(path: Path, pieces: list[Piece], offsets: dict[str, int], total: int) -> None:
    """Write all tensors. The parts of a tensor are written one after the other, starting at the tensor's offset."""
    with path.open("r+b") as file, progress(total=total, what="export", unit="B") as bar:
        for name, values in make_parts(pieces):
            data = values.contiguous().cpu().view(-1).view(torch.uint8).numpy()
            file.seek(offsets[name])
            file.write(data.data)
            offsets[name] += data.nbytes
            bar.update(data.nbytes)
        file.flush()
        os.fsync(file.fileno())


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


_KEYS = {
    "num_hidden_layers": "add_block_count",
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "head_dim": "add_key_length",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "num_local_experts": "add_expert_count",
    "num_experts_per_tok": "add_expert_used_count",
    "sliding_window": "add_sliding_window",
    "rope_theta": "add_rope_freq_base",
    "rope_scaling.factor": "add_rope_scaling_factor",
    "rope_scaling.original_max_position_embeddings": "add_rope_scaling_orig_ctx_len",
    "rope_scaling.beta_fast": "add_rope_scaling_yarn_beta_fast",
    "rope_scaling.beta_slow": "add_rope_scaling_yarn_beta_slow",
}
"""Key of config.json -> method of gguf's writer that adds the key's value to the metadata."""

EXPORTER = Exporter(
    write=write,
    kind=Kind.foreign,
    layout=layout,
    describe=describe,
    check_source=_check_source,
    mark="blk.",
    open=GgufFile,
    read_description=read_description,
    is_one_file=True,
)
