"""Checkpoints are written shard by shard, and every error in a checkpoint on disk is reported."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import read_files, weight_map_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensor_bits import random_bytes
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import TensorInfo, expert_projections, packed_tensors, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.recognition import find_left_over
from pipeline.checkpoints.shards import INDEX, SINGLE, Piece, piece_in_one_step, write_sharded
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models.tiny_model import create_tiny

SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}
EXPERTS = "model.layers.0.mlp.experts."
BLOCKS, SCALES = f"{EXPERTS}down_proj_blocks", f"{EXPERTS}down_proj_scales"
SINKS = "model.layers.1.self_attn.sinks"


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


# Writing.


class Maker:
    """Stores pieces. When a piece makes its tensors, the name of its first tensor is added to `made`."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.pieces: list[Piece] = []
        self.made: list[str] = []
        self.failing: set[str] = set()

    def add(self, **tensors: Tensor) -> None:
        infos = {name: TensorInfo(SAFETENSORS_TYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        self.tensors |= tensors
        self.pieces.append(piece_in_one_step(infos, lambda: self._make(tensors)))

    def _make(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(iter(tensors))
        self.made.append(name)
        if name in self.failing:
            raise RuntimeError(f"no {name} today")
        return tensors


@pytest.fixture
def maker() -> Maker:
    """Five pieces of 40, 40, 40, 100 and 10 bytes. With a limit of 80 bytes they fill four shards."""
    torch.manual_seed(0)
    maker = Maker()
    maker.add(first=random_bytes(40))
    maker.add(second=torch.randn(2, 10).bfloat16())
    maker.add(third=torch.randn(10))
    maker.add(fourth_blocks=random_bytes(3, 31), fourth_scales=random_bytes(7))
    maker.add(fifth=torch.randn(5).half())
    return maker


FOUR_SHARDS = [["first", "second"], ["third"], ["fourth_blocks", "fourth_scales"], ["fifth"]]
MADE = ["second", "first", "third", "fourth_blocks", "fifth"]  # in a shard the wider types come first
FOUR_NAMES = [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def shards_in(directory: Path) -> dict[str, list[str]]:
    return {path.name: sorted(load_file(path)) for path in sorted(directory.glob("*.safetensors"))}


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_tensors_are_read_back_byte_for_byte(tmp_path: Path) -> None:
    torch.manual_seed(0)
    maker = Maker()
    maker.add(b_odd=random_bytes(3, 7), a_bf16=torch.randn(5, 3).bfloat16())
    maker.add(z_f32=torch.randn(2, 3, 5), y_one_byte=random_bytes(1))
    maker.add(x_special=torch.tensor([torch.nan, -0.0, torch.inf, 2.0**-149]), w_f16=torch.randn(9).half())
    maker.add(v_odd=random_bytes(2, 3, 5, 7))
    write_sharded(tmp_path, maker.pieces, 10**6, "test")
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(maker.tensors)
        assert file.metadata() == {"format": "pt"}
        for name, tensor in maker.tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert as_bytes(found) == as_bytes(tensor)


def test_strided_tensors_are_written_in_the_order_of_their_indices(tmp_path: Path) -> None:
    maker = Maker()
    maker.add(
        transposed=torch.randn(4, 6).T, every_second=random_bytes(5, 10)[:, ::2], expanded=torch.ones(1).expand(3)
    )
    write_sharded(tmp_path, maker.pieces, 10**6, "test")
    for name, found in load_file(tmp_path / "model-00001-of-00001.safetensors").items():
        assert torch.equal(found, maker.tensors[name])


def test_every_tensor_starts_at_a_multiple_of_its_value_size(tmp_path: Path) -> None:
    maker = Maker()
    maker.add(a=torch.randn(3).bfloat16(), b=torch.randn(4), c=random_bytes(3), d=torch.randn(1).half())
    write_sharded(tmp_path, maker.pieces, 10**6, "test")
    path = tmp_path / "model-00001-of-00001.safetensors"
    header = header_of(path)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start % 8 == 0
    starts = {name: header[name]["data_offsets"][0] for name in maker.tensors}
    assert [name for name in starts if starts[name] % maker.tensors[name].itemsize] == []


def test_shards_keep_the_order_and_the_limit_and_do_not_split_pieces(tmp_path: Path, maker: Maker) -> None:
    write_sharded(tmp_path, maker.pieces, 80, "test")
    assert shards_in(tmp_path) == dict(zip(FOUR_NAMES, FOUR_SHARDS, strict=True))
    assert maker.made == MADE


@pytest.mark.parametrize(("limit", "shards"), [(1, 5), (79, 5), (80, 4), (120, 2), (229, 2), (230, 1)])
def test_only_a_shard_with_a_single_piece_exceeds_the_limit(
    limit: int, shards: int, tmp_path: Path, maker: Maker
) -> None:
    write_sharded(tmp_path, maker.pieces, limit, "test")
    found = shards_in(tmp_path)
    assert len(found) == shards
    piece_of = {name: number for number, piece in enumerate(maker.pieces) for name in piece.tensors}
    for names in found.values():
        size = sum(maker.tensors[name].nbytes for name in names)
        assert size <= limit or len({piece_of[name] for name in names}) == 1


def test_the_index_lists_every_tensor_once_and_the_total_size(tmp_path: Path, maker: Maker) -> None:
    returned = write_sharded(tmp_path, maker.pieces, 80, "test")
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 230},
        "weight_map": {name: file for file, names in zip(FOUR_NAMES, FOUR_SHARDS, strict=True) for name in names},
    }
    assert returned.bytes == 230


def test_only_shards_and_the_index_remain(tmp_path: Path, maker: Maker) -> None:
    write_sharded(tmp_path, maker.pieces, 80, "test")
    assert sorted(read_files(tmp_path)) == sorted([*FOUR_NAMES, INDEX])


@pytest.mark.parametrize("missing", [[], [0], [1], [2], [0, 3], [0, 1, 2, 3]])
def test_a_second_call_makes_only_tensors_of_missing_shards(missing: list[int], tmp_path: Path, maker: Maker) -> None:
    write_sharded(tmp_path, maker.pieces, 80, "test")
    whole = read_files(tmp_path)
    for shard in missing:
        (tmp_path / FOUR_NAMES[shard]).rename(tmp_path / f"{FOUR_NAMES[shard]}.tmp")  # as after an interruption
    (tmp_path / INDEX).unlink()
    maker.made.clear()
    assert write_sharded(tmp_path, maker.pieces, 80, "test").bytes == 230
    wanted = {name for shard in missing for name in FOUR_SHARDS[shard]}
    assert maker.made == [name for name in MADE if name in wanted]
    assert read_files(tmp_path) == whole


def test_a_longer_unfinished_shard_is_truncated(tmp_path: Path, maker: Maker) -> None:
    write_sharded(tmp_path, maker.pieces, 80, "test")
    whole = read_files(tmp_path)
    (tmp_path / FOUR_NAMES[1]).unlink()
    (tmp_path / f"{FOUR_NAMES[1]}.tmp").write_bytes(b"\xff" * 5000)
    write_sharded(tmp_path, maker.pieces, 80, "test")
    assert read_files(tmp_path) == whole


@pytest.mark.parametrize("failing", ["first", "second", "fourth_blocks"])
def test_an_exception_leaves_only_whole_shards_and_the_next_call_resumes(
    failing: str, tmp_path: Path, maker: Maker
) -> None:
    maker.failing = {failing}
    with pytest.raises(RuntimeError, match=f"no {failing} today"):
        write_sharded(tmp_path, maker.pieces, 80, "test")
    done = next(number for number, names in enumerate(FOUR_SHARDS) if failing in names)
    first_again = next(name for name in MADE if name in FOUR_SHARDS[done])
    assert shards_in(tmp_path) == dict(zip(FOUR_NAMES[:done], FOUR_SHARDS[:done], strict=True))
    assert not (tmp_path / INDEX).exists()

    maker.failing = set()
    maker.made.clear()
    write_sharded(tmp_path, maker.pieces, 80, "test")
    assert maker.made[0] == first_again
    other = tmp_path / "uninterrupted"
    other.mkdir()
    write_sharded(other, maker.pieces, 80, "test")
    assert read_files(other) == {name: (tmp_path / name).read_bytes() for name in [*FOUR_NAMES, INDEX]}
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("made", [torch.zeros(3, 5), torch.zeros(5, 3).bfloat16(), torch.zeros(15)])
def test_a_tensor_with_another_type_or_shape_leaves_no_shard(made: Tensor, tmp_path: Path) -> None:
    piece = piece_in_one_step({"odd_one": TensorInfo("F32", (5, 3))}, lambda: {"odd_one": made})
    with pytest.raises(AssertionError, match="odd_one: made"):
        write_sharded(tmp_path, [piece], 10**6, "test")
    assert list(tmp_path.glob("*.safetensors")) == []


def disk_with_free(size: int) -> Callable[[Path], Any]:
    usage = namedtuple("usage", "total used free")
    return lambda _: usage(10**12, 10**12 - size, size)


def test_too_little_disk_space_is_an_error_before_anything_is_made(
    tmp_path: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", disk_with_free(229))
    with pytest.raises(UserError, match=f"{tmp_path}: needs .* MB, but the disk has"):
        write_sharded(tmp_path, maker.pieces, 80, "test")
    assert maker.made == []
    assert read_files(tmp_path) == {}


def test_only_missing_shards_need_disk_space(tmp_path: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sharded(tmp_path, maker.pieces, 80, "test")
    (tmp_path / FOUR_NAMES[1]).unlink()
    monkeypatch.setattr("shutil.disk_usage", disk_with_free(40))
    write_sharded(tmp_path, maker.pieces, 80, "test")
    assert sorted(read_files(tmp_path)) == sorted([*FOUR_NAMES, INDEX])


# Opening.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def plain(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint in the plain layout, as a single file without an index."""
    directory = tmp_path / "plain"
    directory.mkdir()
    source = Checkpoint(tiny)
    save_file({name: source.read_plain(name) for name in plain_tensors(source.shape)}, directory / SINGLE)
    source.close()
    shutil.copyfile(tiny / CONFIG, directory / CONFIG)
    return directory


def error_of(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint(directory)
    return str(caught.value)


def only_problem(directory: Path) -> str:
    message = error_of(directory)
    assert "problems:" not in message, message
    return message


def edit_index(directory: Path, **changes: str | None) -> None:
    """Change only the index: map tensors to other files, or drop them (None)."""
    weight_map = {name: file for name, file in (weight_map_of(directory) | changes).items() if file is not None}
    content = json.loads((directory / INDEX).read_text()) | {"weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(content))


def edit(directory: Path, change: dict[str, Tensor | None], *, in_index: bool = True) -> None:
    """Replace, add or drop (None) tensors in their shards. If `in_index` is true, change the index too."""
    weight_map = weight_map_of(directory)
    for name, tensor in change.items():
        file = weight_map.get(name, min(weight_map.values()))
        tensors = load_file(directory / file)
        tensors.pop(name, None)
        save_file(tensors if tensor is None else {**tensors, name: tensor}, directory / file, {"format": "pt"})
        if in_index:
            edit_index(directory, **{name: None if tensor is None else file})


def stored(directory: Path, name: str) -> Tensor:
    return load_file(directory / weight_map_of(directory)[name])[name]


def test_a_packed_checkpoint_opens_with_the_tensors_of_its_layout(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    assert checkpoint.is_packed
    assert checkpoint.tensors == packed_tensors(checkpoint.shape)
    assert checkpoint.config == json.loads((tiny / CONFIG).read_text())
    shards = sorted(tiny.glob("*.safetensors"))
    assert len(shards) > 1
    assert checkpoint.weight_files() == [*shards, tiny / INDEX]
    assert checkpoint.weight_bytes == sum(path.stat().st_size for path in shards)


def test_a_plain_checkpoint_in_a_single_file_opens(plain: Path) -> None:
    checkpoint = Checkpoint(plain)
    assert not checkpoint.is_packed
    assert checkpoint.tensors == plain_tensors(checkpoint.shape)
    assert checkpoint.weight_files() == [plain / SINGLE]


def test_a_plain_checkpoint_may_be_in_another_floating_type(plain: Path) -> None:
    tensors = load_file(plain / SINGLE)
    save_file({name: tensor.float() for name, tensor in tensors.items()}, plain / SINGLE)
    checkpoint = Checkpoint(plain)
    assert checkpoint.tensors == plain_tensors(checkpoint.shape, "F32")


def test_stored_tensors_are_read_unchanged(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    for file in sorted(tiny.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found = checkpoint.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert as_bytes(found) == as_bytes(tensor)


def test_a_closed_checkpoint_can_be_read_again(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    before = checkpoint.read(SINKS)
    checkpoint.close()
    assert as_bytes(checkpoint.read(SINKS)) == as_bytes(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_are_decoded_as_transformers_decodes_them(dtype: torch.dtype, tiny: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    checkpoint = Checkpoint(tiny)
    for projection in expert_projections(checkpoint.shape):
        expected = convert_moe_packed_tensors(
            checkpoint.read(projection.blocks), checkpoint.read(projection.scales), dtype=dtype
        )
        found = checkpoint.read_plain(projection.name, dtype)
        assert found.is_contiguous()
        assert (found.dtype, found.shape) == (dtype, projection.plain_tensor().shape)
        assert as_bytes(found) == as_bytes(expected)


def test_tensors_that_are_not_experts_are_read_as_stored(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    for name in (SINKS, "lm_head.weight", f"{EXPERTS}down_proj_bias"):
        assert as_bytes(checkpoint.read_plain(name)) == as_bytes(stored(tiny, name))


def test_experts_of_a_plain_checkpoint_are_read_as_stored(plain: Path) -> None:
    name = f"{EXPERTS}gate_up_proj"
    assert as_bytes(Checkpoint(plain).read_plain(name)) == as_bytes(load_file(plain / SINGLE)[name])


def test_the_error_names_the_position_of_a_nan_scale(copy: Path) -> None:
    scales = stored(copy, SCALES)
    scales[3, 17, 1] = scales[3, 18, 0] = scales[5, 0, 0] = 255
    edit(copy, {SCALES: scales})
    checkpoint = Checkpoint(copy)
    with pytest.raises(UserError) as caught:
        checkpoint.read_plain(f"{EXPERTS}down_proj")
    message = str(caught.value)
    assert f"{copy / weight_map_of(copy)[SCALES]}: {SCALES}" in message
    assert "expert 3, row 17, block 1, the first of 3 in the part that was read." in message
    assert checkpoint.read_plain(f"{EXPERTS}gate_up_proj").isfinite().all()


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    assert error_of(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such directory."


def test_a_file_in_place_of_the_directory_is_an_error(tiny: Path) -> None:
    assert error_of(tiny / CONFIG) == f"{tiny / CONFIG}: no such directory."


def test_a_directory_without_config_is_an_error(copy: Path) -> None:
    (copy / CONFIG).unlink()
    assert only_problem(copy).startswith(f"{copy}: has no config.json")


def test_adapters_without_their_base_model_are_an_error(copy: Path) -> None:
    (copy / CONFIG).rename(copy / "adapter_config.json")
    assert error_of(copy).startswith(
        f"{copy}: holds adapters (adapter_config.json), not a whole model. Give their base"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b'{"model_type": "gpt_oss",', "not valid JSON"),
        (b"\xff\xfe{}", "not in UTF-8"),
        (b"[]", "holds list, not an object"),
    ],
)
def test_a_config_that_is_not_a_json_object_is_an_error(content: bytes, reason: str, copy: Path) -> None:
    (copy / CONFIG).write_bytes(content)
    assert only_problem(copy).startswith(f"{copy / CONFIG}: {reason}")


def test_another_architecture_is_an_error(copy: Path) -> None:
    config = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps({**config, "model_type": "qwen3_moe"}))
    assert only_problem(copy).startswith(f"{copy / CONFIG}: model_type is 'qwen3_moe', not 'gpt_oss'")


def test_a_directory_without_weights_is_an_error(copy: Path) -> None:
    for path in (*copy.glob("*.safetensors"), copy / INDEX):
        path.unlink()
    assert only_problem(copy) == f"{copy}: has no weights: neither {INDEX} nor {SINGLE}. Fetch the *.safetensors files."


def test_a_missing_shard_is_an_error(copy: Path) -> None:
    file = weight_map_of(copy)[SINKS]
    (copy / file).unlink()
    assert only_problem(copy) == f"{copy}: weight file {file} is missing. Fetch it again."


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["empty", "in_the_length", "in_the_header", "last_byte_missing"])
def test_a_truncated_shard_is_an_error(kept: int, copy: Path) -> None:
    path = copy / weight_map_of(copy)[SINKS]
    path.write_bytes(path.read_bytes()[:kept])
    assert only_problem(copy).startswith(f"{path}: damaged or truncated")


def test_a_shard_with_extra_bytes_is_an_error(copy: Path) -> None:
    path = copy / weight_map_of(copy)[SINKS]
    path.write_bytes(path.read_bytes() + b"\0")
    assert only_problem(copy).startswith(f"{path}: damaged or truncated")


def test_a_weight_file_that_is_not_in_the_index_is_an_error(copy: Path) -> None:
    save_file({"stray": torch.ones(1)}, copy / "stray.safetensors")
    message = only_problem(copy)
    assert message.startswith(
        f"{copy / 'stray.safetensors'}: lies beside the files in {INDEX}, and programs do not agree"
    )
    assert message.endswith("Move the weights that you do not want, and their index, to another directory.")


def test_shards_without_their_index_are_an_error(copy: Path) -> None:
    (copy / INDEX).unlink()
    message = error_of(copy)
    assert f"{copy}: weight file {SINGLE} is missing." in message
    assert all(str(path) in message for path in copy.glob("*.safetensors"))


def test_a_stored_tensor_that_is_not_in_the_index_is_an_error(copy: Path) -> None:
    file = weight_map_of(copy)[SINKS]
    edit_index(copy, **{SINKS: None})
    assert only_problem(copy) == f"{copy / file}: holds {SINKS}, which is not in {INDEX}."


def test_a_tensor_in_the_index_that_is_not_stored_is_an_error(copy: Path) -> None:
    file = weight_map_of(copy)[SINKS]
    edit(copy, {SINKS: None}, in_index=False)
    assert only_problem(copy) == f"{copy / INDEX}: says that {SINKS} is in {file}, but it is not."


def test_a_tensor_in_another_shard_than_in_the_index_is_an_error(copy: Path) -> None:
    file = weight_map_of(copy)[SINKS]
    other = next(f for f in sorted(set(weight_map_of(copy).values())) if f != file)
    edit_index(copy, **{SINKS: other})
    message = error_of(copy)
    assert f"{copy / INDEX}: says that {SINKS} is in {other}, but it is not." in message
    assert f"{copy / file}: holds {SINKS}, which is not in {INDEX}." in message


def test_a_tensor_in_two_shards_is_an_error(copy: Path) -> None:
    file = weight_map_of(copy)[SINKS]
    other = next(f for f in sorted(set(weight_map_of(copy).values())) if f != file)
    save_file({**load_file(copy / other), SINKS: stored(copy, SINKS)}, copy / other)
    assert only_problem(copy) == f"{copy / other}: holds {SINKS}, which is not in {INDEX}."


@pytest.mark.parametrize("outside", ["../x.safetensors", "/tmp/x.safetensors", "below/x.safetensors"])
def test_an_index_that_points_outside_its_directory_is_an_error(outside: str, copy: Path) -> None:
    save_file({SINKS: stored(copy, SINKS)}, copy.parent / "x.safetensors")
    edit_index(copy, **{SINKS: outside})
    assert only_problem(copy) == f"{copy / INDEX}: names files outside its directory: {outside}."


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_unreadable_index_is_an_error(content: str, copy: Path) -> None:
    (copy / INDEX).write_text(content)
    assert only_problem(copy).startswith((f"{copy / INDEX}: not a readable index", f"{copy / INDEX}: not valid JSON"))


@pytest.mark.parametrize(("present", "absent"), [(BLOCKS, SCALES), (SCALES, BLOCKS)])
def test_blocks_without_scales_and_scales_without_blocks_are_an_error(present: str, absent: str, copy: Path) -> None:
    edit(copy, {absent: None})
    assert only_problem(copy) == f"{copy}: {present} is there, but {absent} is missing."


def test_an_expert_projection_without_blocks_and_scales_is_an_error(copy: Path) -> None:
    edit(copy, {BLOCKS: None, SCALES: None})
    message = error_of(copy)
    assert f"tensor {BLOCKS} is missing" in message
    assert f"tensor {SCALES} is missing" in message


def test_blocks_without_scales_are_an_error_beside_plain_experts_too(plain: Path) -> None:
    save_file({**load_file(plain / SINGLE), BLOCKS: torch.zeros(8, 64, 3, 16, dtype=torch.uint8)}, plain / SINGLE)
    assert only_problem(plain) == f"{plain}: {BLOCKS} is there, but {SCALES} is missing."


@pytest.mark.parametrize(
    ("name", "reshape", "found", "expected"),
    [
        (SCALES, lambda t: t.transpose(1, 2), [8, 3, 64], [8, 64, 3]),
        (SCALES, lambda t: t[..., :2], [8, 64, 2], [8, 64, 3]),
        (SCALES, lambda t: t.unsqueeze(-1), [8, 64, 3, 1], [8, 64, 3]),
        (BLOCKS, lambda t: t.flatten(2), [8, 64, 48], [8, 64, 3, 16]),
        (BLOCKS, lambda t: t[:7], [7, 64, 3, 16], [8, 64, 3, 16]),
        (SINKS, lambda t: t[:2], [2], [4]),
    ],
)
def test_the_error_names_a_wrong_shape_and_the_right_one(
    name: str, reshape: Callable[[Tensor], Tensor], found: list[int], expected: list[int], copy: Path
) -> None:
    edit(copy, {name: reshape(stored(copy, name)).contiguous()})
    assert only_problem(copy) == f"{copy}: tensor {name} has shape {found}, not {expected}."


@pytest.mark.parametrize(
    ("name", "dtype", "found", "expected"),
    [
        (SCALES, torch.float8_e8m0fnu, "F8_E8M0", "U8"),
        (SCALES, torch.int8, "I8", "U8"),
        (SCALES, torch.bfloat16, "BF16", "U8"),
        (BLOCKS, torch.int8, "I8", "U8"),
        (BLOCKS, torch.float8_e4m3fn, "F8_E4M3", "U8"),
        (SINKS, torch.float32, "F32", "BF16"),
        (SINKS, torch.int64, "I64", "BF16"),
    ],
)
def test_the_error_names_a_wrong_type_and_the_right_one(
    name: str, dtype: torch.dtype, found: str, expected: str, copy: Path
) -> None:
    tensor = stored(copy, name)
    edit(copy, {name: tensor.view(dtype) if tensor.itemsize == dtype.itemsize else tensor.to(dtype)})
    assert only_problem(copy) == f"{copy}: tensor {name} has type {found}, not {expected}."


def test_a_plain_checkpoint_of_integers_is_an_error(plain: Path) -> None:
    tensors = load_file(plain / SINGLE)
    save_file({**tensors, SINKS: tensors[SINKS].to(torch.int32)}, plain / SINGLE)
    assert only_problem(plain) == f"{plain}: tensor {SINKS} has type I32, not BF16."


def test_a_missing_tensor_is_an_error(copy: Path) -> None:
    edit(copy, {SINKS: None})
    assert only_problem(copy) == f"{copy}: tensor {SINKS} is missing."


def test_an_unexpected_tensor_is_an_error(copy: Path) -> None:
    name = "model.layers.2.self_attn.sinks"
    edit(copy, {name: torch.zeros(4, dtype=torch.bfloat16)})
    assert only_problem(copy) == f"{copy}: tensor {name} does not belong there."


def test_plain_experts_beside_packed_ones_are_an_error(copy: Path) -> None:
    name = f"{EXPERTS}down_proj"
    edit(copy, {name: torch.zeros(8, 96, 64, dtype=torch.bfloat16)})
    assert only_problem(copy) == f"{copy}: tensor {name} does not belong there."


def test_experts_transposed_to_the_packed_order_are_an_error(plain: Path) -> None:
    name = f"{EXPERTS}down_proj"
    tensors = load_file(plain / SINGLE)
    save_file({**tensors, name: tensors[name].transpose(1, 2).contiguous()}, plain / SINGLE)
    assert only_problem(plain) == f"{plain}: tensor {name} has shape [8, 64, 96], not [8, 96, 64]."


def test_problems_with_files_are_reported_together(copy: Path) -> None:
    first, second, *_ = sorted(copy.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(b"")
    save_file({"stray": torch.ones(1)}, copy / "stray.safetensors")
    message = error_of(copy)
    assert message.startswith("3 problems:")
    assert f"weight file {first.name} is missing" in message
    assert f"{second}: damaged or truncated" in message
    assert f"{copy / 'stray.safetensors'}: lies beside the files in {INDEX}" in message


def test_problems_with_tensors_are_reported_together(copy: Path) -> None:
    edit(copy, {SINKS: None, SCALES: stored(copy, SCALES)[..., :2].contiguous(), "extra.weight": torch.ones(1)})
    message = error_of(copy)
    assert message.startswith("3 problems:")
    assert f"tensor {SINKS} is missing." in message
    assert f"tensor {SCALES} has shape [8, 64, 2], not [8, 64, 3]." in message
    assert "tensor extra.weight does not belong there." in message


def test_many_tensors_with_the_same_problem_are_one_line(copy: Path) -> None:
    edit(copy, {f"extra.{number}": torch.ones(1) for number in range(20)})
    assert only_problem(copy) == f"{copy}: 20 tensors do not belong there: extra.0, extra.1, extra.10 and 17 more."


def test_many_tensors_that_the_index_does_not_know_are_one_line(copy: Path) -> None:
    edit(copy, {f"extra.{number}": torch.ones(1) for number in range(20)}, in_index=False)
    assert only_problem(copy).startswith(f"{copy / INDEX}: does not match the weight files. 0 tensors are not in the")


def test_names_that_a_wrapper_changed_are_one_line(plain: Path) -> None:
    tensors = load_file(plain / SINGLE)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, plain / SINGLE)
    assert only_problem(plain).startswith(f"{plain}: the names of all tensors begin with 'base_model.model.', which a")


def test_several_missing_shards_are_one_line(copy: Path) -> None:
    files = sorted(path.name for path in copy.glob("*.safetensors"))
    edit_index(copy, **{f"extra.{number}": f"model-{number}.safetensors" for number in range(4)})
    assert only_problem(copy) == (
        f"{copy}: 4 of {len(files) + 4} weight files are missing: model-0.safetensors, model-1.safetensors,"
        " model-2.safetensors and 1 more. Fetch them again."
    )


def test_beside_a_left_over_index_the_single_file_is_read_as_transformers_does(plain: Path, copy: Path) -> None:
    before = {name: Checkpoint(plain).read(name) for name in Checkpoint(plain).tensors}
    shutil.copyfile(copy / INDEX, plain / INDEX)
    opened = Checkpoint(plain)
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in before.items())
    assert opened.weight_files() == [plain / SINGLE]
    assert find_left_over(plain)[-1].startswith(f"{plain / INDEX}: is left over from another save")


def test_a_single_file_beside_shards_is_refused_and_no_advice_deletes_weights(plain: Path, copy: Path) -> None:
    shutil.copyfile(plain / SINGLE, copy / SINGLE)
    message = only_problem(copy)
    assert message.startswith(f"{copy / SINGLE}: lies beside the files in {INDEX}")
    assert message.endswith("Move the weights that you do not want, and their index, to another directory.")


def test_pointers_of_git_lfs_are_one_line(copy: Path) -> None:
    for path in copy.glob("*.safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "weight files are pointers of Git LFS (model-00001-of-" in only_problem(copy)
    assert only_problem(copy).endswith(f"git -C {copy} lfs pull")
