"""Shards made in parts: order, digests, notes, interruptions, errors in every thread, a full disk, and memory."""

import errno
import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from run_files import read_files
from safetensors import safe_open
from tensor_bits import as_bytes, random_bytes
from torch import Tensor

from pipeline.checkpoints import direct_io, shards
from pipeline.checkpoints.gpt_oss import TensorInfo
from pipeline.checkpoints.shards import INDEX, Part, Piece, Step, Written, piece_in_one_step, write_sharded
from pipeline.errors import UserError
from pipeline.runs.artifacts import SHARDS_FILE
from pipeline.runs.json_files import seal, write_json

TYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}
ONE_SHARD = "model-00001-of-00001.safetensors"
THREADS = ("read", "write", "disk")
LONG_ENOUGH = 20  # seconds that a thread waits for another one before the test fails


def infos_of(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(TYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def step_of(part: Part) -> Step:
    return Step(lambda: part[1], lambda read: [(part[0], read)])


def in_parts(tensors: dict[str, Tensor], rows: int, note: Callable[[], Any] = lambda: None) -> Piece:
    """Return a piece that makes its tensors in steps of `rows` rows."""
    parts = [(name, part) for name, tensor in tensors.items() for part in tensor.split(rows)]
    return Piece(infos_of(tensors), lambda: map(step_of, parts), note)


def piece_of(infos: dict[str, TensorInfo], *parts: Part) -> Piece:
    return Piece(infos, lambda: map(step_of, parts))


def raise_(error: BaseException) -> Any:
    raise error


def write(directory: Path, pieces: Iterable[Piece], shard_bytes: int = 10**6) -> Written:
    return write_sharded(directory, list(pieces), shard_bytes, "test")


def shards_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def records_in(directory: Path) -> dict[str, Any]:
    path = directory / SHARDS_FILE
    return json.loads(path.read_text())["shards"] if path.exists() else {}


def flip_one_bit(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(7, 5), "b": torch.randn(7, 3).bfloat16(), "c": torch.randn(9).half()}


STACKS = ("one", "two", "three", "four")
NAMES = [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]
STACK_BYTES = 6 * 10


@pytest.fixture
def stacks() -> dict[str, Tensor]:
    """Tensors of STACK_BYTES bytes. If this is the limit, each tensor fills one shard."""
    torch.manual_seed(1)
    return {name: random_bytes(6, 10) for name in STACKS}


def pieces_of(stacks: dict[str, Tensor], said: Any = "first") -> list[Piece]:
    return [in_parts({name: stack}, 2, lambda name=name: {"of": name, "said": said}) for name, stack in stacks.items()]


# Parts.


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_parts_give_the_same_file_as_whole_tensors(rows: int, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    write(tmp_path / "whole", [piece_in_one_step(infos_of(tensors), lambda: tensors)])
    write(tmp_path / "parts", [in_parts(tensors, rows)])
    assert read_files(tmp_path / "parts") == read_files(tmp_path / "whole")
    with safe_open(tmp_path / "parts" / ONE_SHARD, framework="pt") as file:
        assert {name: as_bytes(file.get_tensor(name)) for name in file.keys()} == {  # noqa: SIM118 - not a dict
            name: as_bytes(tensor) for name, tensor in tensors.items()
        }


def test_a_step_may_make_parts_of_several_tensors(tmp_path: Path) -> None:
    """The export makes the blocks of one expert after the other, and the scales of all experts in the last step."""
    torch.manual_seed(0)
    blocks, scales = random_bytes(5, 4, 16), random_bytes(5, 4)

    def convert(first: int) -> Iterable[Part]:
        yield "blocks", blocks[first : first + 2]
        if first == 4:
            yield "scales", scales

    piece = Piece(
        infos_of({"blocks": blocks, "scales": scales}),
        lambda: [Step(lambda first=first: first, convert) for first in (0, 2, 4)],
    )
    write(tmp_path, [piece])
    with safe_open(tmp_path / ONE_SHARD, framework="pt") as file:
        assert torch.equal(file.get_tensor("blocks"), blocks)
        assert torch.equal(file.get_tensor("scales"), scales)


def test_parts_may_have_any_strides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    turned = torch.randn(6, 4, 8).transpose(1, 2)
    write(tmp_path, [in_parts({"turned": turned}, 2)])
    with safe_open(tmp_path / ONE_SHARD, framework="pt") as file:
        assert torch.equal(file.get_tensor("turned"), turned)


def test_steps_of_a_piece_are_requested_when_it_is_its_turn(tmp_path: Path, stacks: dict[str, Tensor]) -> None:
    events: list[str] = []

    def steps(name: str) -> Iterable[Step]:
        events.append(f"begin {name}")
        return [Step(lambda: None, lambda _: events.append(f"make {name}") or [(name, stacks[name])])]

    pieces = [Piece(infos_of({name: stacks[name]}), lambda name=name: steps(name)) for name in STACKS]
    write(tmp_path, pieces, STACK_BYTES)
    assert sorted(events) == sorted(f"{what} {name}" for name in STACKS for what in ("begin", "make"))
    assert events.index("make one") < events.index("begin four")


WIDE = {"wide": TensorInfo("F32", (4, 3)), "next": TensorInfo("F32", (2, 3))}
WRONG_PARTS: dict[str, list[Part]] = {
    "another type": [("wide", torch.zeros(4, 3).bfloat16())],
    "another width": [("wide", torch.zeros(3, 4))],
    "no rows": [("wide", torch.zeros(12))],
    "more dimensions": [("wide", torch.zeros(4, 3, 1))],
    "too many rows": [("wide", torch.zeros(5, 3))],
    "too many rows in the end": [("wide", torch.zeros(3, 3)), ("wide", torch.zeros(2, 3))],
    "one more part": [("wide", torch.zeros(4, 3)), ("wide", torch.zeros(1, 3)), ("next", torch.zeros(2, 3))],
    "the next tensor first": [("next", torch.zeros(2, 3)), ("wide", torch.zeros(4, 3))],
    "the next tensor too early": [
        ("wide", torch.zeros(3, 3)),
        ("next", torch.zeros(2, 3)),
        ("wide", torch.zeros(1, 3)),
    ],
    "too few rows": [("wide", torch.zeros(4, 3)), ("next", torch.zeros(1, 3))],
    "a tensor never made": [("wide", torch.zeros(4, 3))],
    "nothing": [],
}


@pytest.mark.parametrize("parts", WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_parts_with_another_type_or_shape_or_order_stop_the_conversion_and_leave_no_shard(
    parts: list[Part], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"wide|next"):
        write(tmp_path, [piece_of(WIDE, *parts)])
    assert shards_in(tmp_path) == []
    assert records_in(tmp_path) == {}
    assert not (tmp_path / INDEX).exists()
    assert threads() == []


def test_a_piece_that_makes_too_few_rows_is_an_error(tmp_path: Path) -> None:
    short = piece_of({"short": TensorInfo("F32", (4, 3))}, ("short", torch.zeros(3, 3)))
    with pytest.raises(AssertionError, match="short"):
        write(tmp_path, [short, in_parts({"good": torch.ones(4, 3)}, 1)])
    assert shards_in(tmp_path) == []


# Digests and notes.


def expected_digests(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Compute the digests of the files and of the tensors' data from the disk."""
    files = {name: xxhash.xxh3_128_hexdigest((directory / name).read_bytes()) for name in shards_in(directory)}
    data: dict[str, str] = {}
    for name in files:
        with safe_open(directory / name, framework="pt") as file:
            data |= {key: xxhash.xxh3_128_hexdigest(as_bytes(file.get_tensor(key))) for key in file.keys()}  # noqa: SIM118
    return files, data


@pytest.mark.parametrize("buffer_bytes", [16, 100, 1 << 24])
def test_digests_match_the_files_and_the_data_of_each_tensor(
    buffer_bytes: int, tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", buffer_bytes)
    written = write(tmp_path, [in_parts({name: tensor}, 2) for name, tensor in tensors.items()], 100)
    assert len(written.files) == 2
    assert (written.files, written.tensors) == expected_digests(tmp_path)


def interrupt(directory: Path, stacks: dict[str, Tensor], failing: str) -> None:
    """Run a conversion that fails in the middle of one stack's shard."""
    pieces = pieces_of(stacks)
    broken = [Step(lambda: raise_(RuntimeError("power cut")), lambda _: [])]
    at = STACKS.index(failing)
    pieces[at] = Piece(pieces[at].tensors, lambda: [step_of((failing, stacks[failing][:2])), *broken])
    with pytest.raises(RuntimeError, match="power cut"):
        write(directory, pieces, STACK_BYTES)
    assert shards_in(directory) == NAMES[:at]


@pytest.mark.parametrize("failing", STACKS)
def test_a_resumed_conversion_has_the_digests_of_an_uninterrupted_one(
    failing: str, tmp_path: Path, stacks: dict[str, Tensor]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    interrupt(tmp_path / "resumed", stacks, failing)
    one, other = (write(tmp_path / name, pieces_of(stacks), STACK_BYTES) for name in ("whole", "resumed"))
    assert one == other
    assert (other.files, other.tensors) == expected_digests(tmp_path / "resumed")
    assert read_files(tmp_path / "resumed") == read_files(tmp_path / "whole")


def test_notes_come_in_the_order_of_the_pieces_without_those_that_are_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    notes: list[dict[str, Any] | None] = [{"number": 0}, None, {"number": 2, "nested": {"share": 0.1}}, {}]
    pieces = [in_parts({f"t{i}": random_bytes(4, 3)}, 1, lambda note=note: note) for i, note in enumerate(notes)]
    assert write(tmp_path, pieces, 24).notes == [{"number": 0}, {"number": 2, "nested": {"share": 0.1}}, {}]


def test_a_note_is_requested_after_the_last_step_of_its_piece(tmp_path: Path) -> None:
    seen: list[int] = []
    step = Step(lambda: None, lambda _: seen.append(1) or [("t", torch.zeros(1, 2))])
    piece = Piece({"t": TensorInfo("F32", (3, 2))}, lambda: [step] * 3, lambda: {"steps": len(seen)})
    assert write(tmp_path, [piece]).notes == [{"steps": 3}]


@pytest.mark.parametrize("failing", STACKS)
def test_notes_of_finished_shards_survive_an_interruption_and_others_are_made(
    failing: str, tmp_path: Path, stacks: dict[str, Tensor]
) -> None:
    interrupt(tmp_path, stacks, failing)
    written = write(tmp_path, pieces_of(stacks, "second"), STACK_BYTES)
    done = STACKS.index(failing)
    assert written.notes == [{"of": name, "said": "first" if i < done else "second"} for i, name in enumerate(STACKS)]


def test_notes_keep_their_numbers_to_the_last_bit(tmp_path: Path, stacks: dict[str, Tensor]) -> None:
    number = 0.1 + 0.2 + 2.0**60
    write(tmp_path, pieces_of(stacks, [number, 1e-300, 7]), STACK_BYTES)
    (tmp_path / NAMES[3]).unlink()
    notes = write(tmp_path, pieces_of(stacks, "second"), STACK_BYTES).notes
    assert [note["said"] for note in notes] == [[number, 1e-300, 7]] * 3 + ["second"]


# Which shards are kept.


def convert_again(directory: Path, stacks: dict[str, Tensor]) -> list[str]:
    """Run a second conversion, check its result, and return the stacks that it made."""
    made: list[str] = []

    def piece(name: str) -> Piece:
        step = Step(lambda: None, lambda _: made.append(name) or [(name, stacks[name])])
        return Piece(infos_of({name: stacks[name]}), lambda: [step])

    written = write(directory, map(piece, STACKS), STACK_BYTES)
    assert (written.files, written.tensors) == expected_digests(directory)
    assert written.tensors == {name: xxhash.xxh3_128_hexdigest(as_bytes(stacks[name])) for name in STACKS}
    return made


@pytest.fixture
def finished(tmp_path: Path, stacks: dict[str, Tensor]) -> Path:
    """Four shards and their records."""
    write(tmp_path, pieces_of(stacks), STACK_BYTES)
    return tmp_path


def test_finished_shards_are_not_made_again(finished: Path, stacks: dict[str, Tensor]) -> None:
    before = {name: (finished / name).stat().st_ino for name in NAMES}
    assert convert_again(finished, stacks) == []
    assert {name: (finished / name).stat().st_ino for name in NAMES} == before


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c + b"\0", lambda c: b""], ids=["short", "long", "empty"]
)
def test_a_shard_of_another_size_is_made_again(
    change: Callable[[bytes], bytes], finished: Path, stacks: dict[str, Tensor]
) -> None:
    path = finished / NAMES[1]
    path.write_bytes(change(path.read_bytes()))
    assert convert_again(finished, stacks) == ["two"]


@pytest.mark.parametrize("at", [-1, 20], ids=["data", "header"])
def test_a_shard_with_a_flipped_bit_is_named_and_made_again(
    at: int, finished: Path, stacks: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    flip_one_bit(finished / NAMES[1], at)
    assert convert_again(finished, stacks) == ["two"]
    told = f"[test] warning: {finished / NAMES[1]}: differs from the file before the interruption"
    assert told in capsys.readouterr().err


def test_damaged_records_are_named_and_every_shard_is_made_again(
    finished: Path, stacks: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (finished / SHARDS_FILE).read_text()
    (finished / SHARDS_FILE).write_text(text.replace('"size": 1', '"size": 3', 1).replace('"size": 2', '"size": 3', 1))
    assert convert_again(finished, stacks) == list(STACKS)
    assert f"{finished / SHARDS_FILE}: not readable, so all weight files are made again" in capsys.readouterr().err


def test_records_with_notes_of_another_version_are_not_used(
    finished: Path, stacks: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their notes may lack fields. Version 0 had no version, and no other entry than the shards."""
    write_json(finished / SHARDS_FILE, records_in(finished))
    assert convert_again(finished, stacks) == list(STACKS)
    assert "written by another version of this program, so all weight files are made again" in capsys.readouterr().err


def test_a_missing_shard_is_made_again(finished: Path, stacks: dict[str, Tensor]) -> None:
    (finished / NAMES[2]).unlink()
    assert convert_again(finished, stacks) == ["three"]


def test_a_shard_without_a_record_is_made_again(finished: Path, stacks: dict[str, Tensor]) -> None:
    """It may be incomplete."""
    records = records_in(finished)
    del records[NAMES[0]]
    write_json(finished / SHARDS_FILE, seal({"version": shards.NOTES_VERSION, "shards": records}))
    (finished / NAMES[0]).write_bytes(b"\xff" * (finished / NAMES[0]).stat().st_size)
    assert convert_again(finished, stacks) == ["one"]


def test_without_records_every_shard_is_made_again(finished: Path, stacks: dict[str, Tensor]) -> None:
    (finished / SHARDS_FILE).unlink()
    assert convert_again(finished, stacks) == list(STACKS)


def test_a_shard_that_was_recorded_but_not_renamed_is_made_again(
    tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = shards._Output.publish
    monkeypatch.setattr(
        shards._Output, "publish", lambda self, i: publish(self, i) if i < 2 else raise_(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, pieces_of(stacks), STACK_BYTES)
    assert list(records_in(tmp_path)) == NAMES[:3]
    assert shards_in(tmp_path) == NAMES[:2]
    monkeypatch.undo()
    assert convert_again(tmp_path, stacks) == ["three", "four"]


def test_records_from_another_limit_are_not_used(finished: Path, stacks: dict[str, Tensor]) -> None:
    written = write(finished, pieces_of(stacks), 2 * STACK_BYTES)
    assert len(written.files) == 2
    assert all(
        xxhash.xxh3_128_hexdigest((finished / name).read_bytes()) == written.files[name] for name in written.files
    )


# Errors.


def failing_read(stack: Part) -> list[Step]:
    return [Step(lambda: raise_(RuntimeError("no luck")), lambda _: [])]


def failing_convert(stack: Part) -> list[Step]:
    return [Step(lambda: None, lambda _: raise_(RuntimeError("no luck")))]


def failing_between_parts(stack: Part) -> list[Step]:
    def convert(_: None) -> Iterable[Part]:
        yield stack[0], stack[1][:3]
        raise RuntimeError("no luck")

    return [Step(lambda: None, convert)]


def failing_steps(stack: Part) -> list[Step]:
    raise RuntimeError("no luck")


@pytest.mark.parametrize("steps", [failing_read, failing_convert, failing_between_parts, failing_steps])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_an_error_while_making_leaves_whole_shards_and_no_thread(
    at: int, steps: Callable[[Part], list[Step]], tmp_path: Path, stacks: dict[str, Tensor]
) -> None:
    pieces = pieces_of(stacks)
    stack = (STACKS[at], stacks[STACKS[at]])
    pieces[at] = Piece(
        pieces[at].tensors, lambda: [step_of((stack[0], stack[1][:2])), *steps((stack[0], stack[1][2:]))]
    )
    with pytest.raises(RuntimeError, match="no luck"):
        write(tmp_path, pieces, STACK_BYTES)
    assert threads() == []
    assert not (tmp_path / INDEX).exists()
    left = shards_in(tmp_path)
    assert left == NAMES[: len(left)]
    assert len(left) <= at
    for name, stack_name in zip(left, STACKS, strict=False):
        with safe_open(tmp_path / name, framework="pt") as file:
            assert torch.equal(file.get_tensor(stack_name), stacks[stack_name])
    assert convert_again(tmp_path, stacks) == list(STACKS[len(left) :])


def test_an_error_in_a_note_leaves_its_shard_unfinished(tmp_path: Path, stacks: dict[str, Tensor]) -> None:
    pieces = pieces_of(stacks)
    pieces[1] = in_parts({"two": stacks["two"]}, 2, lambda: raise_(RuntimeError("no luck")))
    with pytest.raises(RuntimeError, match="no luck"):
        write(tmp_path, pieces, STACK_BYTES)
    assert shards_in(tmp_path) == NAMES[:1]
    assert threads() == []


@pytest.mark.parametrize("method", ["write", "_write"])
@pytest.mark.parametrize("calls", [1, 5, 9])
def test_an_error_while_writing_leaves_whole_shards_and_no_thread(
    calls: int, method: str, tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(monkeypatch, method, calls, RuntimeError("broken disk"))
    with pytest.raises(RuntimeError, match="broken disk"):
        write(tmp_path, pieces_of(stacks), STACK_BYTES)
    assert threads() == []
    assert shards_in(tmp_path) == list(records_in(tmp_path))
    left = len(shards_in(tmp_path))
    monkeypatch.undo()
    assert convert_again(tmp_path, stacks) == list(STACKS[left:])


def fail_after(monkeypatch: pytest.MonkeyPatch, method: str, calls: int, error: Exception) -> None:
    """Let a method of a shard work `calls` times, then always fail."""
    original, count = getattr(shards._Shard, method), [0]

    def run(self: Any, *arguments: Any) -> Any:
        count[0] += 1
        return original(self, *arguments) if count[0] <= calls else raise_(error)

    monkeypatch.setattr(shards._Shard, method, run)


def test_an_error_of_the_disk_is_raised(
    tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io.os, "write", lambda *_: raise_(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path, pieces_of(stacks), STACK_BYTES)
    assert shards_in(tmp_path) == []
    assert threads() == []


# A full disk.


def disk_with(monkeypatch: pytest.MonkeyPatch, capacity: int, number: int = errno.ENOSPC) -> None:
    """Simulate a disk with `capacity` bytes and partial writes. Writes beyond the capacity fail."""
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", 16)
    monkeypatch.setattr(direct_io, "_DIRECT", 0)
    written, write_some = [0], os.write

    def run(descriptor: int, data: Any) -> int:
        fitting = min(len(data), capacity - written[0])
        written[0] += fitting
        return write_some(descriptor, data[:fitting]) if fitting else raise_(OSError(number, "No space left on device"))

    monkeypatch.setattr(direct_io.os, "write", run)


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["first header", "data", "last byte", "second header", "second data"])
def test_the_error_of_a_full_disk_says_what_to_do(
    where: str, number: int, tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole", pieces_of(stacks), STACK_BYTES)
    header, size = header_bytes(tmp_path / "whole" / NAMES[0]), (tmp_path / "whole" / NAMES[0]).stat().st_size
    capacity = {
        "first header": 10,
        "data": header + 30,
        "last byte": size - 1,
        "second header": size + 10,
        "second data": size + header + 30,
    }[where]
    directory = tmp_path / "full"
    directory.mkdir()
    disk_with(monkeypatch, capacity, number)
    with pytest.raises(UserError) as caught:
        write(directory, pieces_of(stacks), STACK_BYTES)
    done = capacity // size
    assert str(caught.value).startswith(f"{directory}: the disk is full")
    assert "run the same command again" in str(caught.value)
    assert NAMES[done] in str(caught.value)
    assert shards_in(directory) == NAMES[:done]
    assert threads() == []
    monkeypatch.undo()
    assert convert_again(directory, stacks) == list(STACKS[done:])


@pytest.mark.parametrize("sync_bytes", [1, 1 << 28])
def test_a_full_disk_at_fsync_gives_the_same_error(
    sync_bytes: int, tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems report a full disk only at fsync: NFS, and file systems with delayed allocation.

    With the small `sync_bytes`, fsync is called within a file. With the large value, it is called only at the end.
    """
    monkeypatch.setattr(direct_io, "_SYNC_BYTES", sync_bytes)
    monkeypatch.setattr(direct_io, "_BUFFER_BYTES", 16)
    monkeypatch.setattr(direct_io, "_DIRECT", 0)
    monkeypatch.setattr(direct_io.os, "fsync", lambda _: raise_(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=f"{tmp_path}: the disk is full"):
        write(tmp_path, pieces_of(stacks), STACK_BYTES)
    assert shards_in(tmp_path) == []
    assert threads() == []


@pytest.mark.parametrize("file", [SHARDS_FILE, INDEX])
def test_a_full_disk_at_a_small_file_gives_the_same_error(
    file: str, tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json = shards.write_json

    def run(path: Path, content: Any) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, content)

    monkeypatch.setattr(shards, "write_json", run)
    with pytest.raises(UserError, match=f"{tmp_path}: the disk is full"):
        write(tmp_path, pieces_of(stacks), STACK_BYTES)


# Overlap, and memory.


def waiting_for(event: threading.Event, result: Any) -> Any:
    assert event.wait(LONG_ENOUGH), "timeout: the steps do not overlap"
    return result


def test_the_next_step_is_read_while_one_is_converted(tmp_path: Path, stacks: dict[str, Tensor]) -> None:
    began = {name: threading.Event() for name in STACKS}
    following = dict(pairwise(STACKS))

    def piece(name: str) -> Piece:
        awaited = began[following.get(name, name)]
        step = Step(began[name].set, lambda _: waiting_for(awaited, [(name, stacks[name])]))
        return Piece(infos_of({name: stacks[name]}), lambda: [step])

    for limit in (STACK_BYTES, 10**6):  # one stack per shard, then all stacks in one shard
        directory = tmp_path / str(limit)
        directory.mkdir()
        for event in began.values():
            event.clear()
        write(directory, map(piece, STACKS), limit)


def test_the_next_step_is_converted_while_one_is_written(
    tmp_path: Path, stacks: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = {name: threading.Event() for name in STACKS}
    following = dict(pairwise(STACKS))
    write_part = shards._Shard.write

    def slow(self: Any, name: str, data: Tensor) -> int:
        return waiting_for(began[following.get(name, name)], write_part(self, name, data))

    def piece(name: str) -> Piece:
        step = Step(lambda: None, lambda _: began[name].set() or [(name, stacks[name])])
        return Piece(infos_of({name: stacks[name]}), lambda: [step])

    monkeypatch.setattr(shards._Shard, "write", slow)
    write(tmp_path, map(piece, STACKS))


class Alive:
    """Counts the tensors that are alive, and keeps the largest count."""

    def __init__(self) -> None:
        self.most = self.now = 0
        self._lock = threading.RLock()

    def give(self, tensor: Tensor) -> Tensor:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        with self._lock:
            self.now -= 1


@pytest.mark.parametrize("slow", ["read", "convert", "write"])
def test_few_steps_are_in_memory_whichever_side_is_slow(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, pause = 40, threading.Event()
    alive, read, written = Alive(), [0], [0]
    furthest = [0]
    write_part = shards._Shard.write

    def wait(side: str) -> None:
        if side == slow:
            pause.wait(0.005)  # the event is never set, so this sleeps

    def do_read(i: int) -> Tensor:
        wait("read")
        read[0] += 1
        furthest[0] = max(furthest[0], read[0] - written[0])
        return alive.give(torch.full((1, 1000), float(i)))

    def do_convert(values: Tensor) -> list[Part]:
        wait("convert")
        return [("stack", alive.give(values + 1))]

    def do_write(self: Any, name: str, data: Tensor) -> int:
        wait("write")
        size = write_part(self, name, data)
        written[0] += 1
        return size

    monkeypatch.setattr(shards._Shard, "write", do_write)
    steps = [Step(lambda i=i: do_read(i), do_convert) for i in range(count)]
    write(tmp_path, [Piece({"stack": TensorInfo("F32", (count, 1000))}, lambda: steps)])
    with safe_open(tmp_path / ONE_SHARD, framework="pt") as file:
        assert torch.equal(file.get_tensor("stack")[:, 0], torch.arange(count) + 1.0)
    assert read[0] == written[0] == count
    assert furthest[0] <= 6
    assert alive.most <= 10
    assert alive.now <= 1
