"""Rows are read correctly. A malicious header is an error, and so is a file that shrinks while it is open."""

import json
import os
import resource
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import weight_map_of
from safetensors.torch import load_file, save_file
from tensor_bits import as_bytes
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.gpt_oss import expert_projections, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import INDEX, SINGLE
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models import weights as weights_module
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights

EXPERTS = "model.layers.1.mlp.experts."
NAME = f"{EXPERTS}down_proj"
BLOCKS, SCALES = f"{NAME}_blocks", f"{NAME}_scales"
SINKS = "model.layers.1.self_attn.sinks"
MOST_MEMORY = 1 << 28  # bytes, the most that reading a malicious header may allocate

Header = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("partial") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def shard_of(directory: Path, name: str) -> Path:
    return directory / weight_map_of(directory)[name]


def replace(directory: Path, name: str, change: Callable[[Tensor], Any]) -> None:
    """Change a stored tensor in place."""
    path = shard_of(directory, name)
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def save_plain(tiny: Path, directory: Path, dtype: torch.dtype) -> Path:
    """Save the tiny checkpoint in the plain layout, as a single file. Its tensors have the type `dtype`."""
    directory.mkdir()
    source = Checkpoint(tiny)
    save_file({name: source.read_plain(name).to(dtype) for name in plain_tensors(source.shape)}, directory / SINGLE)
    shutil.copyfile(tiny / CONFIG, directory / CONFIG)
    return directory


# Rows.


ROWS = [slice(None), slice(0, 1), slice(2, 5), slice(5, None), slice(-2, None), slice(7, 100), slice(3, 3), slice(8, 9)]


def assert_rows_are_slices(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            for rows in ROWS:
                found = checkpoint.read(name, rows)
                assert (found.dtype, found.shape) == (tensor.dtype, tensor[rows].shape), (name, rows)
                assert as_bytes(found) == as_bytes(tensor[rows]), (name, rows)


def test_rows_of_a_packed_checkpoint_are_slices_of_the_whole(tiny: Path) -> None:
    assert_rows_are_slices(tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_rows_of_a_plain_checkpoint_are_slices_of_the_whole(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    assert_rows_are_slices(save_plain(tiny, tmp_path / "plain", dtype))


def test_changing_rows_that_were_read_does_not_change_the_file(tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    checkpoint.read(SINKS).zero_()
    assert checkpoint.read(SINKS).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_experts_decoded_in_parts_have_the_same_bits(dtype: torch.dtype, tiny: Path) -> None:
    checkpoint = Checkpoint(tiny)
    for projection in expert_projections(checkpoint.shape):
        whole = checkpoint.read_plain(projection.name, dtype)
        for bounds in ((0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 3, 8), (0, 7, 8)):
            parts = [
                checkpoint.read_plain(projection.name, dtype, slice(first, last)) for first, last in pairwise(bounds)
            ]
            assert as_bytes(torch.cat(parts)) == as_bytes(whole)


@pytest.mark.parametrize("rows", [slice(4, 8), slice(5, 6), slice(3, None), slice(None)], ids=str)
def test_the_error_names_the_position_of_a_nan_scale_in_the_whole_stack(rows: slice, copy: Path) -> None:
    replace(copy, SCALES, lambda scales: scales[5, 17].__setitem__(1, 255))
    checkpoint = Checkpoint(copy)
    with pytest.raises(UserError) as caught:
        checkpoint.read_plain(NAME, rows=rows)
    assert f"{shard_of(copy, SCALES)}: {SCALES}" in str(caught.value)
    assert "expert 5, row 17, block 1." in str(caught.value)
    assert checkpoint.read_plain(NAME, rows=slice(0, 5)).isfinite().all()
    assert checkpoint.read_plain(NAME, rows=slice(6, 8)).isfinite().all()


def test_the_error_names_a_nan_scale_in_a_later_part_of_a_conversion(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "STEP_BYTES", 1)
    replace(copy, SCALES, lambda scales: scales[7, 63].__setitem__(2, 255))
    weights = Weights(ModelRef("source", copy, copy))
    parts = weights.parts(NAME)
    assert len(parts) == 8
    for rows in parts[:-1]:
        weights.read_trained(NAME, rows)
    with pytest.raises(UserError, match=r"expert 7, row 63, block 2\."):
        weights.read_trained(NAME, parts[-1])


def test_blocks_and_scales_may_lie_in_different_shards(copy: Path) -> None:
    before = Checkpoint(copy).read_plain(NAME)
    old = shard_of(copy, SCALES)
    tensors = load_file(old)
    scales = tensors.pop(SCALES)
    save_file(tensors, old, {"format": "pt"})
    save_file({SCALES: scales}, copy / "apart.safetensors", {"format": "pt"})
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"][SCALES] = "apart.safetensors"
    (copy / INDEX).write_text(json.dumps(index))

    checkpoint = Checkpoint(copy)
    assert shard_of(copy, BLOCKS) != shard_of(copy, SCALES)
    assert as_bytes(checkpoint.read_plain(NAME)) == as_bytes(before)
    assert as_bytes(checkpoint.read_plain(NAME, rows=slice(3, 6))) == as_bytes(before[3:6])


# Files that shrink while they are open.


def header_length(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[:8], "little")


def header_of(path: Path) -> Header:
    return json.loads(path.read_bytes()[8 : 8 + header_length(path)])


def data_range(path: Path, name: str) -> tuple[int, int]:
    """Return the positions in the file at which a tensor's data begin and end."""
    first, last = header_of(path)[name]["data_offsets"]
    return 8 + header_length(path) + first, 8 + header_length(path) + last


@pytest.mark.parametrize("was_read", [False, True], ids=["not_read_yet", "read_before"])
@pytest.mark.parametrize("kept", ["nothing", "half_the_length", "half_the_header", "header", "to_it", "all_but_a_byte"])
def test_a_file_that_shrinks_after_it_was_opened_is_an_error(kept: str, was_read: bool, copy: Path) -> None:
    path = shard_of(copy, BLOCKS)
    first, last = data_range(path, BLOCKS)
    sizes = {
        "nothing": 0,
        "half_the_length": 4,
        "half_the_header": 8 + header_length(path) // 2,
        "header": 8 + header_length(path),
        "to_it": first,
        "all_but_a_byte": last - 1,
    }
    checkpoint = Checkpoint(copy)
    if was_read:
        checkpoint.read(BLOCKS)
    os.truncate(path, sizes[kept])
    with pytest.raises(UserError) as caught:
        checkpoint.read(BLOCKS)
    assert str(path) in str(caught.value)
    assert "truncated" in str(caught.value)


def test_rows_before_the_end_of_a_file_that_shrank_can_still_be_read(copy: Path) -> None:
    path = shard_of(copy, BLOCKS)
    checkpoint = Checkpoint(copy)
    whole = checkpoint.read(BLOCKS)
    first, last = data_range(path, BLOCKS)
    os.truncate(path, first + (last - first) // 2)
    assert torch.equal(checkpoint.read(BLOCKS, slice(0, 4)), whole[:4])
    with pytest.raises(UserError, match=f"ends within {BLOCKS}"):
        checkpoint.read(BLOCKS, slice(4, 5))


# Headers.


def as_header(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def with_length(length: int) -> Callable[[Header, bytes], bytes]:
    return lambda header, data: length.to_bytes(8, "little") + as_header(header)[8:] + data


def with_text(text: bytes) -> Callable[[Header, bytes], bytes]:
    return lambda header, data: as_header(text) + data


def with_entry(**changes: Any) -> Callable[[Header, bytes], bytes]:
    """Change the entry of SINKS. None drops a key."""

    def make(header: Header, data: bytes) -> bytes:
        entry = {key: value for key, value in {**header[SINKS], **changes}.items() if value is not None}
        return as_header({**header, SINKS: entry}) + data

    return make


def with_offsets(move: Callable[[int, int, int], list[Any]]) -> Callable[[Header, bytes], bytes]:
    """Replace the offsets of SINKS by the result of move(begin, end, size of all data)."""
    return lambda header, data: with_entry(data_offsets=move(*header[SINKS]["data_offsets"], len(data)))(header, data)


def twice(header: Header, data: bytes) -> bytes:
    """Add a second SINKS with the data of the first. Some readers would return the first, others the second."""
    again = json.dumps({SINKS: header[SINKS]}).encode()
    return as_header(json.dumps(header).encode()[:-1] + b", " + again[1:]) + data


def twice_in_another_spelling(header: Header, data: bytes) -> bytes:
    again = json.dumps({SINKS: header[SINKS]}).encode().replace(b"sinks", rb"\u0073inks")
    return as_header(json.dumps(header).encode()[:-1] + b", " + again[1:]) + data


def twice_elsewhere(header: Header, data: bytes) -> bytes:
    """Add a second SINKS with its own data, so that offsets do not overlap and no bytes are left over."""
    size = header[SINKS]["data_offsets"][1] - header[SINKS]["data_offsets"][0]
    again = json.dumps({SINKS: {**header[SINKS], "data_offsets": [len(data), len(data) + size]}}).encode()
    return as_header(json.dumps(header).encode()[:-1] + b", " + again[1:]) + data + bytes(size)


def on_the_data_of_another(header: Header, data: bytes) -> bytes:
    other = next(entry["data_offsets"][0] for name, entry in header.items() if name not in ("__metadata__", SINKS))
    size = header[SINKS]["data_offsets"][1] - header[SINKS]["data_offsets"][0]
    return with_entry(data_offsets=[other, other + size])(header, data)


def entry_twice(header: Header, data: bytes) -> bytes:
    """Put two pairs of offsets into the entry of SINKS, the second one beyond the end of the file."""
    entry = json.dumps(header[SINKS]).encode()
    text = json.dumps(header).encode().replace(entry, entry[:-1] + b', "data_offsets": [0, 99999999999]}')
    return as_header(text) + data


LYING: dict[str, Callable[[Header, bytes], bytes]] = {
    "length of 2^60": with_length(1 << 60),
    "length of 2^63": with_length(1 << 63),
    "length of 2^64 - 1": with_length((1 << 64) - 1),
    "length of zero": with_length(0),
    "length of 50 MB": with_length(50_000_000),
    "length beyond the file by one": lambda header, data: with_length(len(as_header(header)) + len(data) - 7)(
        header, data
    ),
    "length into the data": lambda header, data: with_length(len(as_header(header)))(header, data),
    "not JSON": with_text(b"weights, honestly"),
    "not UTF-8": with_text(b'{"\xff\xfe": 1}'),
    "JSON cut off": lambda header, data: as_header(json.dumps(header).encode()[:-1]) + data,
    "a list": with_text(b"[]"),
    "a number": with_text(b"7"),
    "null": with_text(b"null"),
    "nested without end": with_text(b'{"a":' * 50_000),
    "lists without end": with_text(b"[" * 50_000),
    "an entry that is a number": lambda header, data: as_header({**header, SINKS: 7}) + data,
    "an entry that is empty": lambda header, data: as_header({**header, SINKS: {}}) + data,
    "metadata that is a number": lambda header, data: as_header({**header, "__metadata__": 7}) + data,
    "an unknown type": with_entry(dtype="MXFP4"),
    "a type of another name": with_entry(dtype="bfloat16"),
    "a type that is a number": with_entry(dtype=16),
    "no type": with_entry(dtype=None),
    "no shape": with_entry(shape=None),
    "no offsets": with_entry(data_offsets=None),
    "a wider type than its offsets": with_entry(dtype="F32"),
    "more values than its offsets": with_entry(shape=[8]),
    "fewer values than its offsets": with_entry(shape=[3]),
    "a negative shape": with_entry(shape=[-4]),
    "a shape of fractions": with_entry(shape=[4.0]),
    "a shape beyond 2^64": with_entry(shape=[1 << 62, 1 << 62]),
    "a shape that wraps around to its size": with_entry(shape=[(1 << 63) + 4]),
    "a shape that is a number": with_entry(shape=4),
    "offsets beyond the file": with_offsets(lambda begin, end, size: [size, size + end - begin]),
    "offsets far beyond the file": with_offsets(lambda begin, end, size: [1 << 60, (1 << 60) + end - begin]),
    "offsets reversed": with_offsets(lambda begin, end, size: [end, begin]),
    "negative offsets": with_offsets(lambda begin, end, size: [begin - end, 0]),
    "offsets of fractions": with_offsets(lambda begin, end, size: [begin + 0.5, end + 0.5]),
    "one offset": with_offsets(lambda begin, end, size: [begin]),
    "three offsets": with_offsets(lambda begin, end, size: [begin, end, end]),
    "the data of another tensor": on_the_data_of_another,
    "a hole before its data": lambda header, data: with_offsets(
        lambda begin, end, size: [size + 2, size + 2 + end - begin]
    )(header, data + bytes(10)),
    "bytes of no tensor": lambda header, data: as_header(header) + data + b"\0",
    "a tensor twice": twice,
    "a tensor twice, spelt in another way": twice_in_another_spelling,
    "a tensor twice, with data each": twice_elsewhere,
    "offsets twice": entry_twice,
}


@pytest.mark.parametrize("lie", LYING.values(), ids=LYING)
def test_the_error_names_a_file_with_a_malicious_header(lie: Callable[[Header, bytes], bytes], copy: Path) -> None:
    path = shard_of(copy, SINKS)
    path.write_bytes(lie(header_of(path), path.read_bytes()[8 + header_length(path) :]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        Checkpoint(copy)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def test_the_error_names_a_tensor_that_is_in_the_header_twice(copy: Path) -> None:
    path = shard_of(copy, SINKS)
    path.write_bytes(twice(header_of(path), path.read_bytes()[8 + header_length(path) :]))
    with pytest.raises(UserError, match=f"{path}: .*{SINKS}"):
        Checkpoint(copy)


def test_the_same_header_in_another_spelling_is_accepted(copy: Path) -> None:
    """A header must be accepted if it has the same content in another form.

    Otherwise the tests of malicious headers would prove nothing.
    """
    path = shard_of(copy, SINKS)
    before = Checkpoint(copy).read(SINKS)
    header, data = header_of(path), path.read_bytes()[8 + header_length(path) :]
    path.write_bytes(as_header(json.dumps(dict(reversed(header.items())), indent=3).encode() + b"   ") + data)
    assert torch.equal(Checkpoint(copy).read(SINKS), before)


def test_a_shard_that_is_a_directory_is_an_error(copy: Path) -> None:
    path = shard_of(copy, SINKS)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=str(path)):
        Checkpoint(copy)


def test_a_shard_that_is_a_link_to_nowhere_is_an_error(copy: Path) -> None:
    """Such links remain in the hub's cache when blobs are removed."""
    path = shard_of(copy, SINKS)
    path.unlink()
    path.symlink_to(copy / "blobs" / "gone")
    with pytest.raises(UserError, match=path.name):
        Checkpoint(copy)


@pytest.mark.parametrize(
    "weight_map",
    [{SINKS: 7}, {SINKS: None}, {SINKS: ["a.safetensors"]}, {SINKS: ""}, {SINKS: "."}, {SINKS: ".."}],
    ids=str,
)
def test_an_index_with_invalid_file_names_is_an_error(weight_map: dict[str, Any], copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **weight_map}}))
    with pytest.raises(UserError, match=f"{copy}"):
        Checkpoint(copy)
