"""Writes checkpoints as safetensors shards, and converts their tensors at the same time.

- Reading, converting and writing overlap. One thread reads ahead, the caller's thread converts, one thread hashes, and
  one thread writes to the disk.
- A tensor is converted in steps of some tens of megabytes, so memory use does not depend on the size of tensors.
- A shard gets its final name only when it is complete and on the disk. An interrupted conversion resumes at the first
  missing shard.
- The writer of safetensors is not used, because it needs all tensors of a file in memory. The format is simple: 8 bytes
  with the length of the header, the header in JSON, and the data.
"""

import errno
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
import xxhash
from torch import Tensor

from pipeline.checkpoints.allocator import keep_freed_memory
from pipeline.checkpoints.direct_io import StreamedFile
from pipeline.checkpoints.dtypes import bytes_per_value, stored_name
from pipeline.checkpoints.gpt_oss import TensorInfo
from pipeline.checkpoints.notes import Note
from pipeline.errors import UserError
from pipeline.runs.artifacts import SHARDS_FILE, digest_of
from pipeline.runs.console import progress, warn
from pipeline.runs.disk import raise_if_disk_too_small
from pipeline.runs.json_files import read_record, seal, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5_000_000_000
"""Size limit of a weight file, in bytes. Stages without a setting for this limit use it."""
STEP_BYTES = 1 << 26
"""Approximate size of a step's output, in bytes.

Such a step is large enough to be fast, and several of them fit in memory.
"""

NOTES_VERSION = 1
"""Version of the notes of pieces. Raise it if a conversion adds or changes a field of its notes.

An interrupted conversion keeps the notes of its finished shards. Shards with notes of another version are made again.
"""

_AHEAD = 2  # number of steps that may wait to be converted, and of parts that may wait to be written
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


Part = tuple[str, Tensor]
"""Name of a tensor, and some of its rows."""


@dataclass(frozen=True)
class Step:
    """One step of the conversion of a piece.

    Attributes:
        read: function that reads the inputs. The reading thread calls it.
        convert: function that turns the inputs into parts. It makes all parts of a tensor before it begins the
            next tensor. The parts of a tensor come in the order of its rows.
    """

    read: Callable[[], Any]
    convert: Callable[[Any], Iterable[Part]]


@dataclass(frozen=True)
class Piece:
    """A group of tensors that are converted together and stored in the same shard.

    Attributes:
        tensors: name -> type and shape, in the order in which the steps make them.
        steps: function that returns the steps. It is called when the piece is about to be read.
        note: function that returns what to record about the piece, or None. Called after the last step.
    """

    tensors: dict[str, TensorInfo]
    steps: Callable[[], Iterable[Step]]
    note: Callable[[], Note | None] = lambda: None

    @property
    def bytes(self) -> int:
        """Size of the tensors' data."""
        return sum(info.bytes for info in self.tensors.values())


def piece_in_one_step(tensors: dict[str, TensorInfo], make: Callable[[], dict[str, Tensor]]) -> Piece:
    """Return a piece that is made in one step. In the piece, tensors of wider types come first."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -bytes_per_value(item[1].dtype)))
    return Piece(ordered, lambda: [Step(make, lambda made: [(name, made[name]) for name in ordered])])


def sort_by_layer(pieces: Iterable[Piece]) -> list[Piece]:
    """Sort pieces by layer, so that shards hold whole layers.

    The layer of a piece is the first number in the name of its first tensor.
    """

    def key(piece: Piece) -> tuple[tuple[int, ...], str]:
        name = next(iter(piece.tensors))
        return tuple(int(part) if part.isdigit() else -1 for part in name.split(".")[:3]), name

    return sorted(pieces, key=key)


@dataclass
class Written:
    """The result of a conversion.

    Attributes:
        bytes: size of all tensors.
        files: name of each shard -> XXH3-128 of its bytes.
        tensors: name of each tensor -> XXH3-128 of its data.
        notes: notes of the pieces, in the order of the shards. Pieces without a note are left out.
    """

    bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


class _Record(TypedDict):
    """Record of a finished shard in SHARDS_FILE. `tensors` maps names to digests. `notes` has the notes of pieces."""

    size: int
    digest: str
    tensors: dict[str, str]
    notes: list[Note]


def write_sharded(directory: Path, pieces: list[Piece], shard_bytes: int, what: str) -> Written:
    """Write the shards and the index. A shard has at most `shard_bytes` bytes. A larger piece gets its own shard.

    If an earlier run of the same conversion was interrupted, its finished shards are kept.

    Raises:
        UserError: the disk has too little space for the missing shards, or fills up while they are written.
    """
    keep_freed_memory()
    shards = _split(pieces, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    done = _finished_shards(directory, what)
    missing = [i for i, name in enumerate(names) if name not in done]
    total, left = sum(piece.bytes for piece in pieces), sum(piece.bytes for i in missing for piece in shards[i])
    raise_if_disk_too_small(directory, left)
    with ExitStack() as stack, progress(total=total, what=what, unit="B") as bar:
        bar.update(total - left)
        output = stack.enter_context(_Output(bar.update))
        for i, made in _run_steps(shards, missing):
            if i not in output.begun:
                with _explain_full_disk(directory / names[i]):
                    output.begin(i, directory / names[i], shards[i])
            if made is not None:
                output.append(*made)
            else:
                done[names[i]] = output.finish(i, shards[i])
                with _explain_full_disk(directory / names[i]):
                    write_json(directory / SHARDS_FILE, seal({"version": NOTES_VERSION, "shards": done}))
                output.publish(i)
    with _explain_full_disk(directory / INDEX):
        _write_index(directory, dict(zip(names, shards, strict=True)), total)
    kept = [done[name] for name in names]
    return Written(
        total,
        {name: record["digest"] for name, record in zip(names, kept, strict=True)},
        {name: digest for record in kept for name, digest in record["tensors"].items()},
        [note for record in kept for note in record["notes"]],
    )


def make_parts(pieces: list[Piece]) -> Iterator[Part]:
    """Run the steps of the pieces and read ahead. Yields the parts of tensors in the order of the steps."""
    for _, made in _run_steps([pieces], [0]):
        if made is not None:
            yield made


def _split(pieces: list[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Distribute pieces over shards. Wider types come first in each shard, so that all offsets are aligned."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.bytes
    return [sorted(shard, key=lambda piece: -_width(piece)) for shard in shards]


def _width(piece: Piece) -> int:
    return min(bytes_per_value(info.dtype) for info in piece.tensors.values())


def _finished_shards(directory: Path, what: str) -> dict[str, _Record]:
    """Return the records of finished shards by name. Omit shards that are missing or damaged, and report damage.

    All shards are read again, because a bit can have changed since they were written.
    """
    path = directory / SHARDS_FILE
    try:
        stored = read_record(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        warn(what, f"{path}: not readable, so all weight files are made again ({error})")
        return {}
    if stored.get("version") != NOTES_VERSION:
        warn(what, f"{path}: written by another version of this program, so all weight files are made again")
        return {}
    return {name: record for name, record in stored["shards"].items() if _is_whole(directory / name, record, what)}


def _is_whole(path: Path, record: _Record, what: str) -> bool:
    """Return whether a shard is as it was written. Report a damaged shard."""
    if not path.is_file():
        return False
    if path.stat().st_size == record["size"] and digest_of(path) == record["digest"]:
        return True
    warn(what, f"{path}: differs from the file before the interruption, so it is made again. Check the disk")
    return False


def _run_steps(shards: list[list[Piece]], missing: list[int]) -> Iterator[tuple[int, Part | None]]:
    """Run the steps of the missing shards and read ahead.

    Yields (index of the shard, part) for each part, and (index of the shard, None) at the end of each shard.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        waiting: deque[tuple[int, Step | None, Future | None]] = deque()
        for i, step in _steps(shards, missing):
            waiting.append((i, step, reader.submit(step.read) if step is not None else None))
            if len(waiting) > _AHEAD:
                yield from _convert(*waiting.popleft())
        while waiting:
            yield from _convert(*waiting.popleft())


def _steps(shards: list[list[Piece]], missing: list[int]) -> Iterator[tuple[int, Step | None]]:
    for i in missing:
        for piece in shards[i]:
            for step in piece.steps():
                yield i, step
        yield i, None


def _convert(i: int, step: Step | None, read: Future | None) -> Iterator[tuple[int, Part | None]]:
    if step is None or read is None:
        yield i, None
        return
    for part in step.convert(read.result()):
        yield i, part


class _Output:
    """Writes shards with two threads. One thread hashes parts and appends them, the other writes to the disk."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self.begun: dict[int, _Shard] = {}
        self._advance = advance
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._pending: deque[Future] = deque()
        self._current: _Shard | None = None

    def __enter__(self) -> "_Output":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown(wait=True, cancel_futures=True)
        self._disk.shutdown(wait=True, cancel_futures=True)
        for shard in self.begun.values():
            shard.close()

    def begin(self, i: int, path: Path, pieces: list[Piece]) -> None:
        infos = {name: info for piece in pieces for name, info in piece.tensors.items()}
        self._current = self.begun[i] = _Shard(path, infos, self._disk)

    def append(self, name: str, values: Tensor) -> None:
        assert self._current is not None
        self._current.check(name, values)
        data = values.detach().contiguous().cpu().view(-1).view(torch.uint8)
        self._submit(self._current.write, name, data)

    def finish(self, i: int, pieces: list[Piece]) -> _Record:
        """Wait until the shard is on the disk, and return its record."""
        while self._pending:
            self._wait()
        shard = self.begun[i]
        notes = [note for piece in pieces if (note := piece.note()) is not None]
        with _explain_full_disk(shard.path):
            return shard.finish(notes)

    def publish(self, i: int) -> None:
        """Give the shard its final name."""
        self.begun[i].temporary.replace(self.begun[i].path)

    def _submit(self, write: Callable[[str, Tensor], int], name: str, data: Tensor) -> None:
        while len(self._pending) >= _AHEAD:
            self._wait()
        self._pending.append(self._writer.submit(write, name, data))

    def _wait(self) -> None:
        assert self._current is not None
        with _explain_full_disk(self._current.path):
            written = self._pending.popleft().result()
        self._advance(written)


class _Shard:
    """A shard that is written sequentially under a temporary name."""

    def __init__(self, path: Path, infos: dict[str, TensorInfo], disk: ThreadPoolExecutor) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self._infos = infos
        self._left = {name: info.bytes for name, info in infos.items()}
        self._digests = {name: xxhash.xxh3_128() for name in infos}
        self._digest = xxhash.xxh3_128()
        self._file = StreamedFile(self.temporary, disk)
        self._write(_header(infos))

    def check(self, name: str, values: Tensor) -> None:
        """Check the next part of a tensor.

        Raises:
            AssertionError: the part has a wrong type or row size, is too large, or is not from the expected tensor.
        """
        due = next((name for name, left in self._left.items() if left), None)
        info, stored = self._infos[name], stored_name(values.dtype)
        row = info.shape[1:]
        if stored != info.dtype or tuple(values.shape[1:]) != row or name != due or values.nbytes > self._left[name]:
            raise AssertionError(
                f"{name}: made {stored} {list(values.shape)}, planned {info.dtype} {list(info.shape)}, due {due}"
            )
        self._left[name] -= values.nbytes

    def write(self, name: str, data: Tensor) -> int:
        view = data.numpy().data
        self._digests[name].update(view)
        self._write(view)
        return len(view)

    def finish(self, notes: list[Note]) -> _Record:
        unmade = [name for name, left in self._left.items() if left]
        if unmade:
            raise AssertionError(f"{self.path.name}: never made: {unmade[:3]}")
        self._file.finish()
        self.close()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return {"size": self._file.size, "digest": self._digest.hexdigest(), "tensors": digests, "notes": notes}

    def close(self) -> None:
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.append(data)


@contextmanager
def _explain_full_disk(path: Path) -> Iterator[None]:
    """Raise UserError if the disk is full when the `with` block writes to `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise UserError(
                f"{path.parent}: the disk is full. Free some space and run the same command again. It resumes at"
                f" {path.name}."
            ) from error
        raise


def _header(infos: dict[str, TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        end = offset + info.bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(directory: Path, shards: dict[str, list[Piece]], total: int) -> None:
    weight_map = {name: file for file, shard in shards.items() for piece in shard for name in piece.tensors}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
