"""Safetensors in and out, tensor by tensor: a checkpoint is checked when opened and written shard by shard.

A shard gets its final name only when it is whole, so an interrupted conversion goes on at the first missing shard.
safetensors' own writer wants all tensors of a file in memory; the format itself does not (8 bytes of header length,
a JSON header, the data), so it is written here with one tensor in memory at a time.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.artifacts import BOOKKEEPING, write_json
from pipeline.errors import UserError, user_errors
from pipeline.gpt_oss import BYTES_PER_VALUE, Shape, TensorInfo, expert_projections, packed_layout, plain_layout
from pipeline.numerics.codec import decode
from pipeline.tracking import progress

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_MOST_PROBLEMS = 8
_FLOATING = ("BF16", "F32", "F16")


class Checkpoint:
    """A gpt-oss checkpoint on disk, packed (MXFP4) or plain, whose names, shapes and files have been checked.

    Attributes:
        directory: where it lies.
        config: config.json as it stands.
        shape: the sizes in it.
        tensors: name -> type and shape of every stored tensor.
        is_packed: whether the experts are MXFP4 blocks and scales.
    """

    def __init__(self, directory: Path) -> None:
        """Open and check.

        Raises:
            UserError: naming the file, key or tensor; several problems together.
        """
        self.directory = directory
        self.config = read_config(directory)
        self.shape = Shape.of(self.config, directory / CONFIG)
        self._files = _stored_files(directory)
        self.tensors = {name: info for tensors in self._files.values() for name, info in tensors.items()}
        self._file_of = {name: file for file, tensors in self._files.items() for name in tensors}
        self.is_packed = any(name.endswith(("_blocks", "_scales")) for name in self.tensors)
        self._raise_if_not_gpt_oss()
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()

    def read(self, name: str) -> Tensor:
        """A stored tensor, as it is."""
        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = self._stack.enter_context(safe_open(self.directory / file, framework="pt"))
        return self._handles[file].get_tensor(name)

    def read_plain(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor of the plain layout; MXFP4 experts are decoded to (E, in, out), exact in BF16.

        Raises:
            UserError: a scale byte of 255 (NaN).
        """
        if name in self.tensors:
            return self.read(name)
        blocks, scales = self.read(f"{name}_blocks"), self.read(f"{name}_scales")
        if bool((scales == 255).any()):
            expert, row, block = (scales == 255).nonzero()[0].tolist()
            raise UserError(
                f"{self.directory / self._file_of[f'{name}_scales']}: {name}_scales: NaN (byte 255) at expert {expert},"
                f" row {row}, block {block}. The checkpoint is damaged."
            )
        plain = torch.stack([decode(b, s, dtype).T for b, s in zip(blocks, scales, strict=True)])
        return plain.contiguous()

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.directory / file).stat().st_size for file in self._files)

    def weight_files(self) -> list[Path]:
        """The weight files, and the index where there is one."""
        files = [self.directory / file for file in self._files]
        return [*files, self.directory / INDEX] if (self.directory / INDEX).is_file() else files

    def close(self) -> None:
        """Let go of the files."""
        self._stack.close()
        self._handles.clear()

    def _raise_if_not_gpt_oss(self) -> None:
        problems = []
        for projection in expert_projections(self.shape):
            has_blocks, has_scales = projection.blocks in self.tensors, projection.scales in self.tensors
            if has_blocks != has_scales:
                present, absent = (
                    (projection.blocks, projection.scales) if has_blocks else (projection.scales, projection.blocks)
                )
                problems.append(f"{present} is there, but {absent} is missing")
        if not problems:
            problems = layout_problems(self.tensors, self.expected())
        if problems:
            raise user_errors([f"{self.directory}: {problem}." for problem in at_most(problems)])

    def expected(self) -> dict[str, TensorInfo]:
        """What a checkpoint of this shape must hold; a plain one may be in any one floating type per tensor."""
        if self.is_packed:
            return packed_layout(self.shape)
        plain = plain_layout(self.shape)
        return {
            name: TensorInfo(stored.dtype, info.shape)
            if (stored := self.tensors.get(name)) is not None and stored.dtype in _FLOATING
            else info
            for name, info in plain.items()
        }


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together and lie in the same shard; `make` is called when it is their turn."""

    tensors: dict[str, TensorInfo]
    make: Callable[[], dict[str, Tensor]]


def layout_problems(stored: dict[str, TensorInfo], expected: dict[str, TensorInfo]) -> list[str]:
    """Every difference between the tensors that are there and those that should be."""
    found = [f"tensor {name} is missing" for name in expected if name not in stored]
    found += [f"tensor {name} does not belong there" for name in stored if name not in expected]
    for name, info in expected.items():
        if name in stored and stored[name].shape != info.shape:
            found.append(f"tensor {name} has shape {list(stored[name].shape)}, not {list(info.shape)}")
        elif name in stored and stored[name].dtype != info.dtype:
            found.append(f"tensor {name} has type {stored[name].dtype}, not {info.dtype}")
    return found


def at_most(problems: list[str], most: int = _MOST_PROBLEMS) -> list[str]:
    """The first few, and how many more."""
    rest = len(problems) - most
    return [*problems[:most], f"and {rest} more"] if rest > 0 else problems


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        UserError: no such directory, no config.json, or not JSON.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory.")
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"{directory}: has no {CONFIG}: not a model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not an object.")
    return config


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what is neither weights nor config: tokenizer, chat template, generation config, licence. Their names."""
    names = side_files(source)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def side_files(directory: Path) -> list[str]:
    """Names of the files that go with a model, but are neither weights nor config nor this program's own."""
    return [p.name for p in sorted(directory.iterdir()) if p.is_file() and _is_side_file(p.name)]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UserError: there is none, it has no chat template, or its vocabulary does not fit the model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no usable tokenizer ({str(error).strip().splitlines()[0]}).") from error
    if not tokenizer.chat_template:
        raise UserError(f"{directory}: the tokenizer has no chat template (chat_template.jinja).")
    vocabulary = read_config(directory)["vocab_size"]
    if len(tokenizer) > vocabulary:
        raise UserError(f"{directory}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}.")
    return tokenizer


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, as configurations write it."""
    return str(dtype).removeprefix("torch.")


def write_config(directory: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """config.json of a plain checkpoint: `config` without quantization, with its type."""
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    write_json(directory / CONFIG, {**plain, "dtype": dtype_name(dtype)})


def link_or_copy(source: Path, target: Path) -> None:
    """The same file in another place: a hard link where the file system allows it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # the hub's cache holds symbolic links
    except OSError:
        shutil.copyfile(source, target)


def write_sharded(directory: Path, pieces: list[Piece], shard_bytes: int, what: str) -> int:
    """Write pieces in order as shards of at most `shard_bytes` (a larger piece gets a shard of its own), and the index.

    Shards that an interrupted run of the same conversion left are kept. Returns the bytes of all tensors.

    Raises:
        UserError: the disk has too little room for what is still to be written.
    """
    shards = _split(pieces, shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(_bytes(piece) for piece in pieces)
    missing = [
        (directory / name, shard) for name, shard in zip(names, shards, strict=True) if not (directory / name).is_file()
    ]
    _raise_if_disk_too_small(directory, sum(_bytes(piece) for _, shard in missing for piece in shard))
    with progress(total=total, what=what, unit="B") as bar:
        bar.update(total - sum(_bytes(piece) for _, shard in missing for piece in shard))
        for path, shard in missing:
            _write_shard(path, shard, bar.update)
    weight_map = {
        name: file for file, shard in zip(names, shards, strict=True) for piece in shard for name in piece.tensors
    }
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _split(pieces: list[Piece], shard_bytes: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + _bytes(piece) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += _bytes(piece)
    return shards


def _bytes(piece: Piece) -> int:
    return sum(info.bytes for info in piece.tensors.values())


def _write_shard(path: Path, shard: list[Piece], advance: Callable[[int], object]) -> None:
    infos = {name: info for piece in shard for name, info in piece.tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # Wider types first: readers view the data as the tensor's type, which needs aligned offsets.
    for name in sorted(infos, key=lambda n: (-BYTES_PER_VALUE[infos[n].dtype], n)):
        end = offset + infos[name].bytes
        header[name] = {"dtype": infos[name].dtype, "shape": list(infos[name].shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        for piece in shard:
            made = piece.make()
            for name, info in piece.tensors.items():
                _raise_if_unlike(name, made[name], info)
                file.seek(start + header[name]["data_offsets"][0])
                file.write(made[name].contiguous().view(torch.uint8).flatten().cpu().numpy().data)
                advance(info.bytes)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _raise_if_unlike(name: str, tensor: Tensor, info: TensorInfo) -> None:
    stored = _SAFETENSORS_TYPES[tensor.dtype]
    if tuple(tensor.shape) != info.shape or stored != info.dtype:
        raise AssertionError(f"{name}: made {stored} {list(tensor.shape)}, planned {info.dtype} {list(info.shape)}")


_SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}


def _raise_if_disk_too_small(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{directory}: needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free."
            " Free some, or set run_dir to another disk."
        )


def _is_side_file(name: str) -> bool:
    return not (
        name in {CONFIG, INDEX, ADAPTER_CONFIG, ".gitattributes", *BOOKKEEPING}
        or name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tmp", ".lock"))
    )


def _stored_files(directory: Path) -> dict[str, dict[str, TensorInfo]]:
    """File -> its tensors, for every weight file; the index, where there is one, must agree with them exactly."""
    present = sorted(p.name for p in directory.glob("*.safetensors") if p.name != ADAPTER_WEIGHTS)
    weight_map = _weight_map(directory)
    listed = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    problems = [f"{directory}: weight file {name} is missing." for name in listed if name not in present]
    problems += [f"{directory / name}: is not in {INDEX}; remove it." for name in present if name not in listed]
    if weight_map is None and not present:
        raise UserError(f"{directory}: has no weights: neither {INDEX} nor {SINGLE}.")
    files: dict[str, dict[str, TensorInfo]] = {}
    for name in (n for n in listed if n in present):
        try:
            files[name] = _read_header(directory / name)
        except SafetensorError as error:
            problems.append(f"{directory / name}: damaged or truncated ({error}). Fetch it again.")
    if weight_map is not None and not problems:
        problems = _index_problems(directory, weight_map, files)
    if problems:
        raise user_errors(at_most(problems))
    return files


def _weight_map(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        assert isinstance(weight_map, dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: not a readable index ({error!r}).") from error
    outside = sorted({str(f) for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f})
    if outside:
        raise UserError(f"{path}: names files outside its directory: {', '.join(outside[:3])}.")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def _index_problems(directory: Path, weight_map: dict[str, str], files: dict[str, dict[str, TensorInfo]]) -> list[str]:
    stored = {(name, file) for file, tensors in files.items() for name in tensors}
    listed = set(weight_map.items())
    return [
        f"{directory / INDEX}: says that {name} is in {file}, where it is not."
        for name, file in sorted(listed - stored)
    ] + [f"{directory / file}: holds {name}, which is not in {INDEX}." for name, file in sorted(stored - listed)]
