"""Ways to break a good export that is not in Hugging Face's layout. Each has a text that a message must contain."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from breaking import (
    INDEX,
    Break,
    add,
    add_file,
    change,
    config,
    drop,
    json_file,
    packed_as,
    rename,
    replace,
    set_at,
    settings,
    without,
)
from mutations import EMBED, GATE_UP, L0, Mutation, exchange_pairs, split_halves, swap_nibbles
from torch import Tensor

gguf = import_module("gguf")

DOWN = "model.layers.1.mlp.experts.down_proj"
QUERIES, KEYS, VALUES = (f"{L0}.self_attn.{part}_proj.weight" for part in "qkv")

# OpenAI's

MLP1, MLP2, QKV = "block.0.mlp.mlp1_weight", "block.1.mlp.mlp2_weight", "block.0.attn.qkv.weight"


def rotate_rows(rows: Tensor) -> Tensor:
    """Move the queries to the end: first keys, then values, then queries."""
    return torch.cat((rows[128:], rows[:128]))


OPENAI = [
    Mutation("swapped nibbles", change(f"{MLP1}.blocks", swap_nibbles), GATE_UP),
    Mutation("scales one higher", change(f"{MLP2}.scales", lambda scales: scales + 1), DOWN),
    Mutation("gate and up in halves", packed_as(split_halves, f"{MLP1}.blocks", f"{MLP1}.scales"), GATE_UP),
    Mutation("experts permuted", packed_as(lambda s: s.roll(1, 0), f"{MLP2}.blocks", f"{MLP2}.scales"), DOWN),
    Mutation("queries, keys and values in another order", change(QKV, rotate_rows), QUERIES),
    Mutation("one bit flipped", change(f"{MLP2}.blocks", set_at(7, 3, 1, 5, to=lambda byte: byte ^ 1)), DOWN, False),
    Mutation("no sinks", drop("block.0.attn.sinks"), "block.0.attn.sinks"),
    Mutation("Hugging Face's name", rename("norm.scale", "model.norm.weight"), "norm.scale"),
    Mutation("FP32 router", change("block.0.mlp.gate.weight", Tensor.float), "block.0.mlp.gate.weight"),
    Mutation("Hugging Face's name of a key", config(lambda content: content.update(num_local_experts=8)), "num_local"),
    Mutation("no rope factor", without("rope_scaling_factor"), "rope_scaling_factor"),
    Mutation("another SwiGLU limit", settings(swiglu_limit=6.0), "swiglu_limit"),
]

# NVFP4

RECORD = "hf_quant_config.json"


def scale_unit(name: str, factor: float) -> Break:
    return change(f"{name}_weight_scale_2", lambda scale: scale * factor)


def permute(name: str, how: Callable[[Tensor], Tensor]) -> Break:
    """Reorder codes and scales of a stack."""

    def as_bytes(tensor: Tensor) -> Tensor:  # torch has few operations on float8
        return how(tensor.view(torch.uint8)).contiguous().view(tensor.dtype)

    return packed_as(as_bytes, name, f"{name}_weight_scale")


def change_record(**values: object) -> Break:
    return json_file(RECORD, lambda content: content["quantization"].update(values))


def set_scale_nan(scales: Tensor) -> Tensor:
    scales.view(torch.uint8)[0, 0, 0] = 0x7F
    return scales


NVFP4 = [
    Mutation("swapped nibbles", change(GATE_UP, swap_nibbles), GATE_UP),
    Mutation("tensor scales doubled", scale_unit(DOWN, 2.0), DOWN),
    Mutation("tensor scales inverted", change(f"{DOWN}_weight_scale_2", torch.reciprocal), DOWN),
    Mutation("one scale NaN", change(f"{DOWN}_weight_scale", set_scale_nan), DOWN),
    Mutation("gate and up exchanged", permute(GATE_UP, lambda s: s.unflatten(2, (-1, 2)).flip(3).flatten(2)), GATE_UP),
    Mutation("experts permuted", permute(DOWN, lambda stack: stack.roll(1, dims=0)), DOWN),
    Mutation("one bit flipped", change(DOWN, set_at(7, 3, 1, to=lambda byte: byte ^ 1)), DOWN, False),
    Mutation("packed along the output", change(DOWN, lambda codes: codes.transpose(1, 2)), DOWN),
    Mutation("no tensor scales", drop(f"{DOWN}_weight_scale_2"), f"{DOWN}_weight_scale_2"),
    Mutation("E8M0 bytes for scales", change(f"{DOWN}_weight_scale", lambda s: s.view(torch.uint8)), "_weight_scale"),
    Mutation("an input scale for one stack", add(f"{DOWN}_input_scale", torch.tensor(1.0)), "_input_scale"),
    Mutation("no record of the quantization", lambda export, _: (export / RECORD).unlink(), RECORD),
    Mutation("inputs said to be 4-bit", change_record(quant_algo="NVFP4"), RECORD),
    Mutation("another group size", change_record(group_size=32), "group_size"),
    Mutation("MXFP4 in config.json", settings(quantization_config={"quant_method": "mxfp4"}), "quant_algo"),
]  # fmt: skip

# GGUF

GATE_BLOCKS, UP_BLOCKS = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"
WINDOW = b"gpt-oss.attention.sliding_window"


def change_blocks(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Break:
    """Replace the stored data of a tensor."""

    def break_(export: Path, _: Path) -> None:
        path = export / "model.gguf"
        reader = gguf.GGUFReader(path)
        tensor = next(each for each in reader.tensors if each.name == name)
        start, data = int(tensor.data_offset), how(np.array(tensor.data)).tobytes()
        content = path.read_bytes()
        replace(path, content[:start] + data + content[start + len(data) :])

    return break_


def change_header(old: bytes, new: bytes) -> Break:
    assert len(old) == len(new)
    return lambda export, _: replace(export / "model.gguf", (export / "model.gguf").read_bytes().replace(old, new, 1))


def change_value_after(key: bytes, how: Callable[[int], int]) -> Break:
    """Change the 32-bit value of a key in GGUF's metadata. A file stores the key, then the type, then the value."""

    def break_(export: Path, _: Path) -> None:
        content = bytearray((export / "model.gguf").read_bytes())
        at = content.index(key) + len(key) + 4
        content[at : at + 4] = how(int.from_bytes(content[at : at + 4], "little")).to_bytes(4, "little")
        replace(export / "model.gguf", bytes(content))

    return break_


def as_blocks(data: np.ndarray) -> np.ndarray:
    return data.reshape(*data.shape[:-1], -1, 17)


def change_codes(how: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    def break_codes(data: np.ndarray) -> np.ndarray:
        as_blocks(data)[..., 1:] = how(as_blocks(data)[..., 1:])
        return data

    return break_codes


def raise_scales(data: np.ndarray) -> np.ndarray:
    as_blocks(data)[..., 0] += 1
    return data


def order_as_hugging_face(bytes_: np.ndarray) -> np.ndarray:
    """Put elements 2 j and 2 j + 1 of a block into one byte."""
    elements = np.concatenate((bytes_ & 15, bytes_ >> 4), axis=-1)
    return elements[..., ::2] | (elements[..., 1::2] << 4)


def flip_one_bit(data: np.ndarray) -> np.ndarray:
    data[7, 3, 5] ^= 1
    return data


def exchange_gate_and_up(export: Path, base: Path) -> None:
    reader = gguf.GGUFReader(export / "model.gguf")
    held = {each.name: np.array(each.data) for each in reader.tensors}
    change_blocks(GATE_BLOCKS, lambda _: held[UP_BLOCKS])(export, base)
    change_blocks(UP_BLOCKS, lambda _: held[GATE_BLOCKS])(export, base)


def truncate(export: Path, _: Path) -> None:
    replace(export / "model.gguf", (export / "model.gguf").read_bytes()[:-4096])


GGUF = [
    Mutation("nibbles in Hugging Face's order", change_blocks(UP_BLOCKS, change_codes(order_as_hugging_face)), GATE_UP),
    Mutation("scales one higher", change_blocks("blk.1.ffn_down_exps.weight", raise_scales), DOWN),
    Mutation("gate and up exchanged", exchange_gate_and_up, GATE_UP),
    Mutation("experts permuted", change_blocks("blk.1.ffn_down_exps.weight", lambda data: np.roll(data, 1, 0)), DOWN),
    Mutation("one bit flipped", change_blocks("blk.1.ffn_down_exps.weight", flip_one_bit), DOWN, False),
    Mutation("sinks zero", change_blocks("blk.0.attn_sinks.weight", np.zeros_like), "self_attn.sinks"),
    Mutation("embedding off by one row", change_blocks("token_embd.weight", lambda data: np.roll(data, 1, 0)), EMBED),
    Mutation("a misspelt tensor", change_header(b"blk.0.attn_sinks", b"blk.0.attn_zinks"), "attn_zinks"),
    Mutation("another architecture", change_header(b"gpt-oss", b"gpt-osz"), "general.architecture"),
    Mutation("another sliding window", change_value_after(WINDOW, lambda n: n + 1), "sliding_window"),
    Mutation("another stop token", change_value_after(b"tokenizer.ggml.eos_token_id", lambda n: n - 1), "eos_token_id"),
    Mutation("a file that ends early", truncate, "model.gguf"),
    Mutation("a second file", add_file("other.gguf"), "2 files"),
    Mutation("weights of another layout beside it", add_file("model.safetensors"), "model.safetensors"),
]  # fmt: skip

# BF16

BF16 = [
    Mutation("gate and up in halves", change(GATE_UP, lambda s: torch.cat((s[..., ::2], s[..., 1::2]), -1)), GATE_UP),
    Mutation("experts permuted", change(DOWN, lambda stack: stack.roll(1, dims=0)), DOWN),
    Mutation("values not rounded", change(DOWN, lambda stack: stack * 1.01), DOWN, False),
    Mutation("one value NaN", change(DOWN, set_at(0, 0, 0, to=lambda _: float("nan"))), DOWN),
    Mutation("experts transposed", change(GATE_UP, lambda stack: stack.transpose(1, 2)), GATE_UP),
    Mutation("FP16 experts", change(DOWN, Tensor.half), DOWN),
    Mutation("biases of gate and up exchanged", change(f"{GATE_UP}_bias", exchange_pairs), f"{GATE_UP}_bias"),
    Mutation("no dtype", without("dtype"), "dtype"),
    Mutation("a quantization config", settings(quantization_config={"quant_method": "mxfp4"}), "quantization_config"),
    Mutation("another total size", json_file(INDEX, lambda c: c["metadata"].update(total_size=1)), "total_size"),
]  # fmt: skip

OF_LAYOUT = {"openai": OPENAI, "nvfp4": NVFP4, "gguf": GGUF, "bf16": BF16}
