"""BF16 sources are packed if every block is exact. Otherwise all inexact blocks are counted, and no file is left."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoints import shards
from pipeline.checkpoints.gpt_oss import QUANTIZATION_CONFIG, expert_projections
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Written
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.export.packing import pack
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.codec import decode, same_bits
from pipeline.runs.artifacts import fingerprint_of

TINY = TinyConfig(num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=3, hidden_size=64, intermediate_size=96)
SHARD_BYTES = 60_000
FIRST, SECOND = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
OFF_GRID = 1 + 2**-7
"""A BF16 value that MXFP4 cannot represent with any scale, because it has too many bits."""
NEGATIVE_ZEROS = 0x88  # two codes
CODES_UP_TO = {6.0: 0xFF, 3.0: 0xDD, 1.5: 0xBB, 0.5: 0x99, 0.0: NEGATIVE_ZEROS}
"""Largest magnitude -> mask for a byte with two codes. The mask leaves no larger magnitudes, and keeps the signs."""
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("packing") / "tiny"
    create_tiny(directory, TINY)
    return directory


def any_block(codes: torch.Generator, experts: int, rows: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Make blocks and scales of all kinds: every scale byte, small codes, negative zeros, and blocks of zeros."""
    made = torch.randint(0, 256, (experts, rows, blocks, 16), generator=codes, dtype=torch.int32)
    scales = torch.randint(0, 255, (experts, rows, blocks), generator=codes, dtype=torch.int32)
    masks = torch.tensor(list(CODES_UP_TO.values()))
    kind = torch.randint(0, len(masks), scales.shape, generator=codes)
    kind = torch.where((scales == 253) & (kind < 1), 1, kind)  # BF16 has no larger values
    kind = torch.where((scales == 254) & (kind < 2), 2, kind)
    return (made & masks[kind][..., None]).to(torch.uint8), scales.to(torch.uint8)


def plain_of(tiny: Path, target: Path, edit: Edit = lambda tensors: None) -> Path:
    """Decode the experts of the tiny model, apply `edit` to all tensors, and write them as a BF16 checkpoint."""
    target.mkdir()
    packed = Checkpoint(tiny)
    experts = {projection.name for projection in expert_projections(packed.shape)}
    tensors = {name: packed.read(name) for name in packed.tensors if not name.endswith(("_blocks", "_scales"))}
    tensors |= {name: packed.read_plain(name).contiguous() for name in experts}
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return target


def spoil(tensors: dict[str, Tensor]) -> None:
    """Move weights of four blocks off the grid. Two of the weights share a block."""
    tensors[FIRST][0, 3, 5] = OFF_GRID  # (E, in, out)
    tensors[FIRST][0, 31, 5] = OFF_GRID
    tensors[FIRST][2, 32, 5] = -OFF_GRID
    tensors[SECOND][1, 95, 0] = OFF_GRID
    tensors[SECOND][1, 0, 63] = OFF_GRID


def pack_into(source: Path, directory: Path) -> Written:
    directory.mkdir(exist_ok=True)
    weights = Weights(ModelRef("source", source, source))
    return pack(weights, directory, shard_bytes=SHARD_BYTES, device="cpu")


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_decoded_release_gets_its_own_layout_and_configuration_back(tiny: Path, tmp_path: Path) -> None:
    made = pack_into(plain_of(tiny, tmp_path / "plain"), tmp_path / "packed")
    packed, released = Checkpoint(tmp_path / "packed"), Checkpoint(tiny)
    assert packed.config == released.config and packed.config["quantization_config"] == QUANTIZATION_CONFIG
    assert packed.tensors == released.tensors
    for name in Checkpoint(tmp_path / "plain").tensors:
        assert same_bits(packed.read_plain(name), released.read_plain(name)), name
    assert made.bytes == sum(info.bytes for info in released.tensors.values())
    (tmp_path / "packed" / "shards.json").unlink()
    assert fingerprint_of(tmp_path / "packed", made.files) == fingerprint_of(tmp_path / "packed")


def test_blocks_of_every_kind_keep_their_values_and_canonical_ones_their_bytes(tiny: Path, tmp_path: Path) -> None:
    codes, sources = torch.Generator().manual_seed(0), {}

    def fill(tensors: dict[str, Tensor]) -> None:
        for projection in expert_projections(Checkpoint(tiny).shape):
            made = any_block(codes, projection.experts, projection.out_features, projection.in_features // 32)
            sources[projection] = made
            tensors[projection.name] = decode(*made).transpose(1, 2).contiguous()

    plain = Checkpoint(plain_of(tiny, tmp_path / "plain", fill))
    pack_into(plain.directory, tmp_path / "packed")
    packed, seen = Checkpoint(tmp_path / "packed"), set()
    for projection, (blocks, scales) in sources.items():
        assert same_bits(packed.read_plain(projection.name), plain.read(projection.name))
        magnitudes = torch.maximum(blocks & 7, blocks >> 4 & 7).amax(dim=-1)
        is_canonical = magnitudes >= 6  # the largest weight is 4 or 6 times the scale
        assert torch.equal(packed.read(projection.blocks)[is_canonical], blocks[is_canonical])
        assert torch.equal(packed.read(projection.scales)[is_canonical], scales[is_canonical])
        seen |= {*scales.flatten().tolist()}
    assert seen == set(range(255))


def test_a_negative_zero_is_kept(tiny: Path, tmp_path: Path) -> None:
    def negate(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST][1] = -0.0

    pack_into(plain_of(tiny, tmp_path / "plain", negate), tmp_path / "packed")
    assert (Checkpoint(tmp_path / "packed").read(FIRST + "_blocks")[1] == NEGATIVE_ZEROS).all()


def test_inexact_blocks_of_the_whole_model_are_counted_and_nothing_is_left(tiny: Path, tmp_path: Path) -> None:
    source = plain_of(tiny, tmp_path / "plain", spoil)
    blocks = sum(projection.values for projection in expert_projections(Checkpoint(tiny).shape)) // 32
    with pytest.raises(UserError) as error:
        pack_into(source, tmp_path / "packed")
    message = str(error.value)
    assert f"upcast.experts=packed: {source} has weights that MXFP4 cannot hold exactly: 4 of {blocks:,}" in message
    assert f"in 2 of 4 tensors. The first is {FIRST}. Set upcast.experts=bf16" in message
    assert files_in(tmp_path / "packed") == []


def test_an_interrupted_count_goes_on_where_it_ended(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, packed = plain_of(tiny, tmp_path / "plain", spoil), tmp_path / "packed"
    publish = shards._Output.publish

    def interrupt(self: Any, i: int) -> None:
        publish(self, i)
        notes = json.loads((packed / "shards.json").read_text())["shards"][self.begun[i].path.name]["notes"]
        if any(note["tensor"] == FIRST for note in notes):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards._Output, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pack_into(source, packed)
    read: list[str] = []
    read_stored = Weights.read_stored

    def note(self: Weights, name: str, *rows: slice) -> tuple[Tensor, ...]:
        read.append(name)
        return read_stored(self, name, *rows)

    monkeypatch.setattr(Weights, "read_stored", note)
    with pytest.raises(UserError, match=re.escape(f"in 2 of 4 tensors. The first is {FIRST}.")) as error:
        pack_into(source, packed)
    assert "exactly: 4 of" in str(error.value)
    assert SECOND in read and FIRST not in read
    assert files_in(packed) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(tiny: Path, tmp_path: Path, bad: float) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[FIRST][2, 40, 17] = bad

    source = plain_of(tiny, tmp_path / "plain", damage)
    with pytest.raises(UserError, match=r"gate_up_proj: (NaN|Inf) at index \[2, 40, 17\]\. The checkpoint is damaged"):
        pack_into(source, tmp_path / "packed")


def test_another_type_than_bf16_is_refused(tiny: Path, tmp_path: Path) -> None:
    source = plain_of(tiny, tmp_path / "plain", lambda tensors: tensors.update({FIRST: tensors[FIRST].float()}))
    with pytest.raises(UserError, match="has F32 tensors; the source must be MXFP4 or BF16"):
        pack_into(source, tmp_path / "packed")


def test_an_input_dimension_that_is_no_multiple_of_32_is_named(tiny: Path, tmp_path: Path) -> None:
    source = plain_of(tiny, tmp_path / "plain")
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts."
        for name in ("gate_up_proj", "gate_up_proj_bias"):
            tensors[experts + name] = tensors[experts + name][..., :80].contiguous()
        tensors[experts + "down_proj"] = tensors[experts + "down_proj"][:, :40].contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(UserError, match=r"layers.0.mlp.experts.down_proj: .* 40 is not a multiple of 32"):
        pack_into(source, tmp_path / "packed")
