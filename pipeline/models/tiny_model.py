"""Make a tiny gpt-oss model, so that the program can be tried and tested without the internet.

The weights are random, but the layout is the same as in the released models: sinks, sliding layers, YaRN, biases,
untied embeddings, MXFP4 experts in several shards, and a Harmony tokenizer. As in the released models, experts are
stored only as blocks and scales, so their weights are MXFP4 values.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import (
    ARCHITECTURE,
    ATTENTION_TYPES,
    EMBEDDING,
    MODEL_TYPE,
    QUANTIZATION_CONFIG,
    SPECIAL_TOKENS,
    Shape,
    TensorInfo,
    expert_projections,
    other_tensors,
)
from pipeline.checkpoints.shards import Piece, piece_in_one_step, write_sharded
from pipeline.config import TinyConfig
from pipeline.data.synthetic import chat_template, tokenizer_corpus
from pipeline.errors import UserError
from pipeline.numerics.codec import encode
from pipeline.numerics.formats import MXFP4
from pipeline.runs.artifacts import SHARDS_FILE
from pipeline.runs.durable import sync, sync_tree

_RESERVED_ROWS = 16  # embedding rows that belong to no token; the released models have such rows too
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


def create_tiny(directory: Path, tiny: TinyConfig) -> None:
    """Write the checkpoint that `tiny` describes. The directory appears only when the checkpoint is complete.

    Raises:
        UserError: the vocabulary is too small for all bytes and special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS) + _RESERVED_ROWS
    if tiny.vocab_size < smallest:
        raise UserError(f"model.tiny.vocab_size={tiny.vocab_size}: must be at least {smallest}.")
    unfinished = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    ids = _write_tokenizer(unfinished, tiny)
    config = _config(tiny, ids)
    _write(unfinished / CONFIG, config)
    _write(unfinished / "generation_config.json", _generation_config(ids))
    write_sharded(unfinished, _pieces(tiny, config), tiny.shard_bytes, "tiny model")
    (unfinished / SHARDS_FILE).unlink()
    sync_tree(unfinished)
    unfinished.replace(directory)
    sync(directory.parent)


def _pieces(tiny: TinyConfig, config: Mapping[str, object]) -> list[Piece]:
    shape = Shape.of(config, CONFIG)
    generator = torch.Generator().manual_seed(tiny.seed)
    pieces = [_random_piece(name, info, generator) for name, info in other_tensors(shape).items()]
    for projection in expert_projections(shape):
        plain = torch.randn(
            projection.experts, projection.out_features, projection.in_features, generator=generator
        ) * (projection.in_features**-0.5)
        blocks, scales = encode(plain.bfloat16(), MXFP4)
        made = {projection.blocks: blocks, projection.scales: scales}
        pieces.append(piece_in_one_step(projection.packed_tensors(), lambda made=made: made))  # type: ignore[misc]
    return sorted(pieces, key=lambda piece: next(iter(piece.tensors)))


def _random_piece(name: str, info: TensorInfo, generator: torch.Generator) -> Piece:
    tensor = torch.randn(info.shape, generator=generator)
    if name.endswith("norm.weight"):
        tensor = 1 + 0.05 * tensor
    elif name.endswith(("bias", "sinks")):
        tensor = 0.1 * tensor
    elif name == EMBEDDING:
        tensor = 0.5 * tensor
    else:
        tensor = tensor * info.shape[-1] ** -0.5
    made: dict[str, Tensor] = {name: tensor.bfloat16()}
    return piece_in_one_step({name: info}, lambda: made)


def _write_tokenizer(directory: Path, tiny: TinyConfig) -> dict[str, int]:
    """Train byte-level BPE on the synthetic data, and add the Harmony special tokens. Return their ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\p{N}{1,3}|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.vocab_size - len(SPECIAL_TOKENS) - _RESERVED_ROWS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_corpus(), trainer)
    tokenizer.add_special_tokens([SPECIAL_TOKENS[i] for i in sorted(SPECIAL_TOKENS)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        model_max_length=_CONTEXT * int(_ROPE_FACTOR),
    )
    wrapped.chat_template = chat_template()
    wrapped.save_pretrained(directory)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS.values()}


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
        "max_position_embeddings": _CONTEXT * int(_ROPE_FACTOR),
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
