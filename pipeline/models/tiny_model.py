"""Make a random gpt-oss model, so that the program can be tried and tested without the internet.

The weights are random, but the layout is the same as in the released models: sinks, sliding layers, YaRN, biases,
untied embeddings, MXFP4 experts in several shards, and a Harmony tokenizer. As in the released models, experts are
stored only as blocks and scales, so their weights are MXFP4 values.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import (
    ARCHITECTURE,
    ATTENTION_TYPES,
    EMBEDDING,
    MODEL_TYPE,
    QUANTIZATION_CONFIG,
    SINKS,
    ExpertProjection,
    Shape,
    TensorInfo,
    expert_projections,
    other_tensors,
)
from pipeline.checkpoints.shards import Part, Piece, Step, piece_in_one_step, write_sharded
from pipeline.config import TinyConfig
from pipeline.data.synthetic import tokenizer_corpus
from pipeline.models import tiny_tokenizer
from pipeline.numerics.codec import encode
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import SHARDS_FILE
from pipeline.runs.console import progress
from pipeline.runs.durable import sync, sync_tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GPT_OSS_20B = TinyConfig(
    num_hidden_layers=24,
    hidden_size=2880,
    intermediate_size=2880,
    num_local_experts=32,
    num_experts_per_tok=4,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    sliding_window=128,
    vocab_size=201_088,
    shard_bytes=5_000_000_000,
)
"""The exact sizes of gpt-oss-20b."""

_GROUP = 16  # values that torch draws together
_STEP_VALUES = 1 << 24
_CONTEXT = 4096
_ROPE_FACTOR = 32.0
_ROPE_SCALING = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": _ROPE_FACTOR,
    "original_max_position_embeddings": _CONTEXT,
    "rope_type": "yarn",
    "truncate": False,
}


def create_tiny(directory: Path, tiny: TinyConfig, ranks: Path | None = None) -> None:
    """Write the checkpoint that `tiny` describes. The directory appears only when the checkpoint is complete.

    The weights are made in steps, so memory does not depend on the size of the model.

    Args:
        directory: directory to make.
        tiny: sizes and seed of the model.
        ranks: file `o200k_base.tiktoken`, to write the released tokenizer. None: train a small tokenizer.

    Raises:
        UserError: the vocabulary is too small for the tokenizer.
    """
    tokenizer = _trained_tokenizer(tiny.vocab_size) if ranks is None else tiny_tokenizer.make_released(ranks)
    with appearing(directory) as unfinished:
        config = write_side_files(unfinished, tiny, tokenizer)
        write_weights(unfinished, _pieces(tiny, config), tiny.shard_bytes, "random model")


@cache
def _trained_tokenizer(vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train the small tokenizer once for each size. A sweep makes the same model for each of its runs."""
    return tiny_tokenizer.train(vocab_size, tokenizer_corpus())


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """Yield an empty directory, which gets the name `directory` at the end of the block, unless an error leaves it."""
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    sync_tree(unfinished)
    unfinished.replace(directory)
    sync(directory.parent)


def write_side_files(directory: Path, tiny: TinyConfig, tokenizer: "PreTrainedTokenizerFast") -> dict[str, object]:
    """Write a tokenizer, config.json and generation_config.json. Return the contents of config.json.

    Raises:
        UserError: the vocabulary is too small for the tokenizer.
    """
    ids = tiny_tokenizer.write(tokenizer, directory, tiny.vocab_size)
    config = _config(tiny, ids)
    _write(directory / CONFIG, config)
    _write(directory / "generation_config.json", _generation_config(ids))
    return config


def write_weights(directory: Path, pieces: Iterable[Piece], shard_bytes: int, what: str) -> None:
    """Write the weight files of a checkpoint, with the tensors in the order of their names."""
    ordered = sorted(pieces, key=lambda piece: next(iter(piece.tensors)))
    write_sharded(directory, ordered, shard_bytes, what)
    (directory / SHARDS_FILE).unlink()


def packed_piece(projection: ExpertProjection, plain: Tensor) -> Piece:
    """Return a piece with a stack of expert weights in MXFP4. `plain` is (E, out, in)."""
    blocks, scales = encode(plain, MXFP4)
    made = {projection.blocks: blocks, projection.scales: scales}
    return piece_in_one_step(projection.packed_tensors(), lambda: made)


@dataclass(frozen=True)
class _Draw:
    """Normally distributed values. `state` is the state of the random generator before the first value."""

    shape: tuple[int, ...]
    state: Tensor

    def steps(self, convert: Callable[[Tensor], Iterable[Part]]) -> Iterator[Step]:
        """Return steps that draw the values in parts, row by row, and convert each part."""
        generator = torch.Generator()
        generator.set_state(self.state)
        for shape in _part_shapes(self.shape):
            yield Step(partial(torch.randn, shape, generator=generator), convert)


def _part_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Divide a tensor into parts of whole rows. Parts hold the values that one draw of the whole tensor would give.

    torch fills a tensor of 16 or more values in groups of 16. So only parts of whole groups have these values.
    """
    rows, row = shape[0], prod(shape[1:])
    if row % _GROUP:
        return [shape]
    count = max(1, _STEP_VALUES // row)
    return [(min(count, rows - first), *shape[1:]) for first in range(0, rows, count)]


def _pieces(tiny: TinyConfig, config: Mapping[str, object]) -> list[Piece]:
    """Plan all tensors. They are written in the order of their names, but drawn in another order."""
    shape = Shape.of(config, CONFIG)
    others, stacks = other_tensors(shape), expert_projections(shape)
    stack_shapes = [(stack.experts, stack.out_features, stack.in_features) for stack in stacks]
    draws = _draws([*(info.shape for info in others.values()), *stack_shapes], tiny.seed)
    pieces = [_random_piece(name, info, next(draws)) for name, info in others.items()]
    pieces += [_expert_piece(stack, next(draws)) for stack in stacks]
    return pieces


def _draws(shapes: Sequence[tuple[int, ...]], seed: int) -> Iterator[_Draw]:
    """Yield the draws of tensors that one generator fills, one tensor after the other.

    A draw begins with the state after the draws before it. The state is known only when these values have been drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    with progress(total=sum(map(prod, shapes)), what="random numbers", unit="") as bar:
        for shape in shapes:
            yield _Draw(shape, generator.get_state())
            for part in _part_shapes(shape):
                torch.randn(part, generator=generator)
                bar.update(prod(part))


def _expert_piece(stack: ExpertProjection, draw: _Draw) -> Piece:
    def steps() -> Iterator[Step]:
        all_scales: list[Tensor] = []

        def convert(values: Tensor) -> Iterator[Part]:
            blocks, scales = encode((values * stack.in_features**-0.5).bfloat16(), MXFP4)
            all_scales.append(scales)
            yield stack.blocks, blocks

        yield from draw.steps(convert)
        yield Step(lambda: None, lambda _: [(stack.scales, torch.cat(all_scales))])

    return Piece(stack.packed_tensors(), steps)


def _random_piece(name: str, info: TensorInfo, draw: _Draw) -> Piece:
    return Piece({name: info}, lambda: draw.steps(lambda values: [(name, _scaled(name, values, info).bfloat16())]))


def _scaled(name: str, values: Tensor, info: TensorInfo) -> Tensor:
    if name.endswith("norm.weight"):
        return 1 + 0.05 * values
    if name.endswith(("bias", SINKS)):
        return 0.1 * values
    return values * (0.5 if name == EMBEDDING else info.shape[-1] ** -0.5)


def _config(tiny: TinyConfig, ids: dict[str, int]) -> dict[str, object]:
    """Make a config.json with the same keys as in the released models."""
    return {
        "architectures": [ARCHITECTURE],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": ids["<|return|>"],
        "experts_per_token": tiny.num_experts_per_tok,
        "head_dim": tiny.head_dim,
        "hidden_act": "silu",
        "hidden_size": tiny.hidden_size,
        "initial_context_length": _CONTEXT,
        "initializer_range": 0.02,
        "intermediate_size": tiny.intermediate_size,
        "layer_types": [ATTENTION_TYPES[layer % 2] for layer in range(tiny.num_hidden_layers)],
        "max_position_embeddings": tiny_tokenizer.CONTEXT,
        "model_type": MODEL_TYPE,
        "num_attention_heads": tiny.num_attention_heads,
        "num_experts_per_tok": tiny.num_experts_per_tok,
        "num_hidden_layers": tiny.num_hidden_layers,
        "num_key_value_heads": tiny.num_key_value_heads,
        "num_local_experts": tiny.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": ids["<|endoftext|>"],
        "quantization_config": QUANTIZATION_CONFIG,
        "rms_norm_eps": 1e-05,
        "rope_scaling": _ROPE_SCALING,
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": tiny.sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": tiny.vocab_size,
    }


def _generation_config(ids: dict[str, int]) -> dict[str, object]:
    return {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }


def name_of(tiny: TinyConfig) -> str:
    """Return the model's directory name. Different settings give different names."""
    import xxhash

    return f"tiny-{xxhash.xxh3_64_hexdigest(json.dumps(asdict(tiny), sort_keys=True).encode())[:8]}"


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
