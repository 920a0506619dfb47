"""Ways to break a good export, each with a text that a message must contain.

Engines load most of these broken exports without a warning.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from breaking import (
    INDEX,
    Break,
    Tensors,
    add,
    add_file,
    add_text,
    change,
    config,
    drop,
    json_file,
    packed,
    part,
    remove_file,
    rename,
    replace,
    set_at,
    settings,
    shards_of,
    tensors,
    without,
    write_index,
    write_shard,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.numerics.codec import decode, encode
from pipeline.numerics.formats import MXFP4

L0, L1 = "model.layers.0", "model.layers.1"
GATE_UP = f"{L0}.mlp.experts.gate_up_proj"
DOWN = f"{L1}.mlp.experts.down_proj"
SINKS = f"{L0}.self_attn.sinks"
EXCLUSIONS = "quantization_config.modules_to_not_convert"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Mutation:
    """One way to break an export.

    Attributes:
        name: description of the defect.
        break_: function that breaks the export.
        named: text that a message must contain.
        shows_against_base: whether the base model is enough to detect the defect.
    """

    name: str
    break_: Break
    named: str
    shows_against_base: bool = True


# Changes of values.


def split_halves(rows: Tensor) -> Tensor:
    return torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1)


def exchange_pairs(rows: Tensor) -> Tensor:
    return rows.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def swap_nibbles(blocks: Tensor) -> Tensor:
    return (blocks << 4) | (blocks >> 4)


def order_as_llama_cpp(blocks: Tensor) -> Tensor:
    """Put elements j and j + 16 of a block into one byte."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    return codes[..., :16] | (codes[..., 16:] << 4)


def round_toward_zero(blocks: Tensor) -> Tensor:
    """Reduce one code in 200 by one step, as if the exporter rounded ties differently from training."""
    is_hit = (torch.arange(blocks.numel()).view(blocks.shape) % 100 == 0) & (blocks & 7 > 0)
    return blocks - is_hit.to(torch.uint8)


def interleave_rope(rows: Tensor, head_dim: int = 32) -> Tensor:
    """Interleave the two halves of each head, as other implementations of RoPE expect."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def pack_on_the_other_axis(all_: Tensors) -> None:
    """Pack blocks along the other axis: from (in, out) instead of (out, in).

    The shape is the same if hidden = intermediate.
    """
    weight = decode(all_[f"{DOWN}_blocks"], all_[f"{DOWN}_scales"], torch.float32)
    all_[f"{DOWN}_blocks"], all_[f"{DOWN}_scales"] = encode(weight.transpose(1, 2).contiguous(), MXFP4)


def view_as_e8m0(scales: Tensor) -> Tensor:
    return scales.view(torch.float8_e8m0fnu)


def resize_vocabulary(export: Path, base: Path) -> None:
    tensors(lambda all_: all_.update({name: all_[name][:-16].clone() for name in (EMBED, HEAD)}))(export, base)
    config(lambda content: content.update(vocab_size=content["vocab_size"] - 16))(export, base)


def fuse_qkv(all_: Tensors) -> None:
    parts = [all_.pop(f"{L0}.self_attn.{part}_proj.weight") for part in "qkv"]
    all_[f"{L0}.self_attn.qkv_proj.weight"] = torch.cat(parts)


def prefix_all(all_: Tensors) -> None:
    for name in list(all_):
        all_[f"module.{name}"] = all_.pop(name)


def exchange_keys_and_values(all_: Tensors) -> None:
    keys, values = (f"{L0}.self_attn.{part}_proj.weight" for part in "kv")
    all_[keys], all_[values] = all_[values], all_[keys]


def exchange_layers(all_: Tensors) -> None:
    for name in [name for name in all_ if name.startswith(f"{L0}.")]:
        other = name.replace(L0, L1)
        all_[name], all_[other] = all_[other], all_[name]


# Changes of files.


def move_rope_settings(content: dict[str, Any]) -> None:
    """Write the rope settings as transformers 5 does."""
    content["rope_parameters"] = {**content.pop("rope_scaling"), "rope_theta": content.pop("rope_theta")}


def remove_exclusions(content: dict[str, Any]) -> None:
    del content["quantization_config"]["modules_to_not_convert"]


def change_stop_token(content: dict[str, Any]) -> None:
    content["eos_token"] = "<|end|>"


def keep_one_stop(content: dict[str, Any]) -> None:
    content["eos_token_id"] = content["eos_token_id"][0]


def change_total(content: dict[str, Any]) -> None:
    content["metadata"]["total_size"] += 1


def separate_blocks_and_scales(export: Path, _: Path) -> None:
    shards = shards_of(export)
    home = next(file for file, of_file in shards.items() if f"{DOWN}_scales" in of_file)
    other = next(file for file in shards if file != home)
    shards[other][f"{DOWN}_scales"] = shards[home].pop(f"{DOWN}_scales")
    for file in (home, other):
        write_shard(export / file, shards[file])
    write_index(export, shards)


def remove_a_shard(export: Path, _: Path) -> None:
    min(export.glob("model-*.safetensors")).unlink()


def leave_an_old_shard(export: Path, _: Path) -> None:
    shutil.copyfile(min(export.glob("model-*.safetensors")), export / "old.safetensors")


def truncate_a_shard(export: Path, _: Path) -> None:
    path = min(export.glob("model-*.safetensors"))
    replace(path, path.read_bytes()[:-100])


def store_a_tensor_twice(export: Path, _: Path) -> None:
    first, *_others, last = shards_of(export).items()
    name = next(iter(last[1]))
    write_shard(export / first[0], {**first[1], name: last[1][name]})


def move_in_the_index(content: dict[str, Any]) -> None:
    weight_map = content["weight_map"]
    weight_map[SINKS] = next(file for file in sorted(set(weight_map.values())) if file != weight_map[SINKS])


def lose_metadata(export: Path, _: Path) -> None:
    path = min(export.glob("model-*.safetensors"))
    write_shard(path, load_file(path), None)


def take_tensors_of_the_base(export: Path, base: Path) -> None:
    """Write a stale shard. Names in the shard are right, but values are from before training."""
    path = next(p for p in sorted(export.glob("model-*.safetensors")) if f"{DOWN}_blocks" in load_file(p))
    stored: Tensors = {}
    for shard in base.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    write_shard(path, {name: stored[name] for name in load_file(path)})


def save_with_transformers(export: Path, _: Path) -> None:
    """Load the model from the MXFP4 directory and call `save_pretrained`."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    quantization = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.bfloat16, quantization_config=quantization)
    for name in ("config.json", "generation_config.json", INDEX, *shards_of(export)):
        (export / name).unlink()
    model.save_pretrained(export)


VALUES = [
    Mutation("swapped nibbles", change(f"{GATE_UP}_blocks", swap_nibbles), GATE_UP),
    Mutation("nibbles in llama.cpp's order", change(f"{GATE_UP}_blocks", order_as_llama_cpp), GATE_UP),
    Mutation("signs lost", change(f"{DOWN}_blocks", lambda blocks: blocks & 0x77), DOWN),
    Mutation("one expert zero", change(f"{DOWN}_blocks", set_at(5, to=torch.zeros_like)), DOWN),
    Mutation("scales one higher", change(f"{GATE_UP}_scales", lambda scales: scales + 1), GATE_UP),
    Mutation("scales one lower", change(f"{DOWN}_scales", lambda scales: scales - 1), DOWN),
    Mutation("scales of one row one higher", change(f"{DOWN}_scales", set_at(2, 9, to=lambda row: row + 1)), DOWN),
    Mutation("scales without the bias", change(f"{GATE_UP}_scales", lambda scales: scales - 127), GATE_UP),
    Mutation("one scale NaN", change(f"{DOWN}_scales", set_at(0, 0, 0, to=lambda _: 255)), DOWN),
    Mutation("gate and up in halves", packed(GATE_UP, split_halves), GATE_UP),
    Mutation("gate and up exchanged", packed(GATE_UP, exchange_pairs), GATE_UP),
    Mutation("biases of gate and up in halves", change(f"{GATE_UP}_bias", split_halves), f"{GATE_UP}_bias"),
    Mutation("biases of gate and up exchanged", change(f"{GATE_UP}_bias", exchange_pairs), f"{GATE_UP}_bias"),
    Mutation("experts permuted", packed(DOWN, lambda stack: stack.roll(1, dims=0)), DOWN),
    Mutation("two experts exchanged", packed(DOWN, lambda stack: stack[[0, 1, 3, 2, 4, 5, 6, 7]]), DOWN),
    Mutation("biases of experts permuted", change(f"{DOWN}_bias", lambda stack: stack.roll(1, dims=0)), f"{DOWN}_bias"),
    Mutation("router permuted", change(f"{L0}.mlp.router.weight", lambda rows: rows.roll(1, dims=0)), "router.weight"),
    Mutation("rows rolled by one", packed(DOWN, lambda stack: stack.roll(1, dims=1)), DOWN),
    Mutation("layers exchanged", tensors(exchange_layers), GATE_UP),
    Mutation("keys and values exchanged", tensors(exchange_keys_and_values), "k_proj"),
    Mutation("queries in another rotary order", change(f"{L0}.self_attn.q_proj.weight", interleave_rope), "q_proj"),
    Mutation("sinks zero", change(SINKS, torch.zeros_like), SINKS),
    Mutation("norm weights less one", change("model.norm.weight", lambda weight: weight - 1), "model.norm.weight"),
    Mutation("head tied to the embedding", tensors(lambda all_: all_.update({HEAD: all_[EMBED].clone()})), HEAD),
    Mutation("embedding off by one row", change(EMBED, lambda rows: rows.roll(1, dims=0)), EMBED),
    Mutation("one bit flipped", change(f"{DOWN}_blocks", set_at(7, 3, 1, 5, to=lambda byte: byte ^ 1)), DOWN, False),
    Mutation("ties rounded otherwise", change(f"{GATE_UP}_blocks", round_toward_zero), GATE_UP, False),
    Mutation("one bias changed", change(f"{GATE_UP}_bias", set_at(2, 2, to=lambda bias: bias + 0.1)), GATE_UP, False),
    Mutation("a shard from before training", take_tensors_of_the_base, L1, False),
]  # fmt: skip
TENSORS = [
    Mutation("no sinks", drop(SINKS), SINKS),
    Mutation("no biases of experts", drop(f"{GATE_UP}_bias", f"{DOWN}_bias"), f"{DOWN}_bias"),
    Mutation("no bias of attention", drop(f"{L0}.self_attn.q_proj.bias"), "q_proj.bias"),
    Mutation("no blocks", drop(f"{GATE_UP}_blocks"), f"{GATE_UP}_blocks"),
    Mutation("no scales", drop(f"{GATE_UP}_scales"), f"{GATE_UP}_scales"),
    Mutation("neither blocks nor scales", drop(f"{DOWN}_blocks", f"{DOWN}_scales"), f"{DOWN}_blocks"),
    Mutation("no router", drop(f"{L1}.mlp.router.weight"), "router.weight"),
    Mutation("no head", drop(HEAD), HEAD),
    Mutation("no embedding", drop(EMBED), EMBED),
    Mutation("misspelt scales", rename(f"{GATE_UP}_scales", f"{GATE_UP}_scale"), f"{GATE_UP}_scales"),
    Mutation("misspelt sinks", rename(SINKS, f"{SINKS}.weight"), SINKS),
    Mutation("blocks with a dot", rename(f"{DOWN}_blocks", f"{DOWN}.blocks"), f"{DOWN}_blocks"),
    Mutation("one name with a prefix", rename(SINKS, f"module.{SINKS}"), f"module.{SINKS}"),
    Mutation("all names with a prefix", tensors(prefix_all), "'module.'"),
    Mutation("queries, keys and values fused", tensors(fuse_qkv), "q_proj.weight"),
    Mutation("adapter tensors left", add(f"{L0}.self_attn.q_proj.lora_A.weight", torch.zeros(8, 64)), "lora_A"),
    Mutation("quantizer state left", add(f"{GATE_UP}_weight_quantizer._amax", torch.zeros(1)), "_amax"),
    Mutation("BF16 experts beside the packed", add(GATE_UP, torch.zeros(8, 64, 192).bfloat16()), GATE_UP),
    Mutation("a layer too many", add("model.layers.2.self_attn.sinks", torch.zeros(4).bfloat16()), "layers.2"),
    Mutation("FP32 biases", change(f"{GATE_UP}_bias", Tensor.float), f"{GATE_UP}_bias"),
    Mutation("FP32 head", change(HEAD, Tensor.float), HEAD),
    Mutation("FP16 norm", change("model.norm.weight", Tensor.half), "model.norm.weight"),
    Mutation("F8_E8M0 scales", change(f"{DOWN}_scales", view_as_e8m0), f"{DOWN}_scales"),
    Mutation("signed blocks", change(f"{DOWN}_blocks", lambda blocks: blocks.view(torch.int8)), f"{DOWN}_blocks"),
    Mutation("blocks flattened", change(f"{DOWN}_blocks", lambda blocks: blocks.flatten(2)), f"{DOWN}_blocks"),
    Mutation("scales transposed", change(f"{DOWN}_scales", lambda scales: scales.transpose(1, 2)), f"{DOWN}_scales"),
    Mutation("an expert fewer", packed(DOWN, lambda stack: stack[:-1].clone()), f"{DOWN}_blocks"),
    Mutation("vocabulary cut to the tokenizer's", resize_vocabulary, "vocab_size"),
    Mutation("embedding padded", change(EMBED, lambda rows: torch.cat((rows, rows[:32]))), EMBED),
    Mutation("saved again by transformers", save_with_transformers, "gate_up_proj"),
]  # fmt: skip
CONFIGURATION = [
    Mutation("no quantization config", without("quantization_config"), "quantization_config"),
    Mutation("quantization config without exclusions", config(remove_exclusions), EXCLUSIONS),
    Mutation("other exclusions", part("quantization_config", modules_to_not_convert=["lm_head"]), EXCLUSIONS),
    Mutation("another quantization method", part("quantization_config", quant_method="fp8"), "quant_method"),
    Mutation("no rope scaling", without("rope_scaling"), "rope_scaling"),
    Mutation("rope settings moved", config(move_rope_settings), "rope_theta"),
    Mutation("rope scaling truncated", part("rope_scaling", truncate=True), "rope_scaling.truncate"),
    Mutation("another rope theta", settings(rope_theta=10000), "rope_theta"),
    Mutation("layer types flipped", config(lambda content: content["layer_types"].reverse()), "layer_types"),
    Mutation("no layer types", without("layer_types"), "layer_types"),
    Mutation("no architecture", without("architectures"), "architectures"),
    Mutation("architecture of a wrapped model", settings(architectures=["FSDPGptOssForCausalLM"]), "architectures"),
    Mutation("no model type", without("model_type"), "model_type"),
    Mutation("tied embeddings", settings(tie_word_embeddings=True), "tie_word_embeddings"),
    Mutation("another sliding window", settings(sliding_window=4096), "sliding_window"),
    Mutation("no SwiGLU limit", without("swiglu_limit"), "swiglu_limit"),
    Mutation("another number of active experts", settings(num_experts_per_tok=2), "num_experts_per_tok"),
    Mutation("another stop token", settings(eos_token_id=1), "eos_token_id"),
    Mutation("another vocabulary size", settings(vocab_size=100), "vocab_size"),
    Mutation("a dtype", settings(dtype="float32"), "dtype"),
    Mutation("no config", remove_file("config.json"), "config.json"),
    Mutation("a damaged config", lambda export, _: replace(export / "config.json", "{"), "config.json"),
]  # fmt: skip
FILES = [
    Mutation("a shard missing", remove_a_shard, "model-00001"),
    Mutation("an old shard left", leave_an_old_shard, "old.safetensors"),
    Mutation("a shard truncated", truncate_a_shard, "model-00001"),
    Mutation("a tensor in two shards", store_a_tensor_twice, "model-00001"),
    Mutation("blocks and scales in different shards", separate_blocks_and_scales, f"{DOWN}_scales"),
    Mutation("no index", remove_file(INDEX), "model.safetensors"),
    Mutation("a tensor elsewhere than the index says", json_file(INDEX, move_in_the_index), SINKS),
    Mutation("a tensor not in the index", json_file(INDEX, lambda content: content["weight_map"].pop(SINKS)), SINKS),
    Mutation("another total size in the index", json_file(INDEX, change_total), "total_size"),
    Mutation("shard without metadata", lose_metadata, "metadata"),
    Mutation("an adapter left", add_file("adapter_config.json"), "adapter_config.json"),
    Mutation("PyTorch weights left", add_file("pytorch_model.bin"), "pytorch_model.bin"),
    Mutation("ModelOpt's state left", add_file("modelopt_state.pth"), "modelopt_state.pth"),
    Mutation("another tool's quantization config", add_file("hf_quant_config.json"), "hf_quant_config.json"),
    Mutation("tokenizer changed", add_text("tokenizer.json"), "tokenizer.json"),
    Mutation("no tokenizer", remove_file("tokenizer.json"), "tokenizer.json"),
    Mutation("special tokens changed", json_file("tokenizer_config.json", change_stop_token), "tokenizer_config.json"),
    Mutation("tokens added", add_file("added_tokens.json"), "added_tokens.json"),
    Mutation("one stop token, not three", json_file("generation_config.json", keep_one_stop), "generation_config"),
    Mutation("no generation config", remove_file("generation_config.json"), "generation_config.json"),
    Mutation("chat template changed", add_text("chat_template.jinja"), "chat_template.jinja"),
    Mutation("no chat template", remove_file("chat_template.jinja"), "chat_template.jinja"),
]  # fmt: skip
SQUARE = [Mutation("blocks along the wrong axis", tensors(pack_on_the_other_axis), DOWN)]
"""Defects that need hidden = intermediate, as in the released models. Otherwise they would change a shape."""

MUTATIONS = [*VALUES, *TENSORS, *CONFIGURATION, *FILES]
