"""Opens and checks checkpoints, and reads whole tensors or rows of them.

Data is read into memory, not mapped. So a file that shrinks during reading raises an error instead of crashing the
process. A tensor uses memory only while the caller keeps it. Several threads can read at the same time.
"""

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.direct_io import StoredFile
from pipeline.checkpoints.dtypes import PLAIN_TYPES, torch_dtype
from pipeline.checkpoints.gpt_oss import (
    Shape,
    TensorInfo,
    expert_projections,
    is_packed_name,
    packed_names,
    packed_tensors,
    plain_tensors,
)
from pipeline.checkpoints.non_finite import find_nan_scales
from pipeline.checkpoints.recognition import (
    describe_weights,
    find_wrapper,
    is_lfs_pointer,
    is_stale_index,
    raise_if_other_layout,
)
from pipeline.checkpoints.shards import INDEX, SINGLE
from pipeline.checkpoints.side_files import ADAPTER_WEIGHTS
from pipeline.errors import MOST_PROBLEMS, UserError, user_errors
from pipeline.numerics.codec import decode
from pipeline.numerics.formats import MXFP4
from pipeline.runs.foreign_files import parse_json, raise_if_irregular, read_json

_SHOWN = 3  # names that a problem lists
_MOST_HEADER_BYTES = 1 << 24  # the headers of the released models have less than 64 KiB


class TensorFiles:
    """The safetensors files of a directory, in any layout. The constructor checks names, headers and the index.

    Attributes:
        directory: directory of the files.
        tensors: name -> type and shape of every stored tensor.
    """

    def __init__(self, directory: Path) -> None:
        """Open and check the files.

        Raises:
            UserError: files or tensors are wrong. Several problems are reported together.
        """
        self.directory = directory
        self._files = _stored_files(directory)
        self.tensors = {name: info for tensors in self._files.values() for name, info in tensors.items()}
        self._file_of = {name: file for file, tensors in self._files.items() for name in tensors}
        self._offsets = {file: _data_offsets(directory / file) for file in self._files}
        self._open: dict[str, StoredFile] = {}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Read a tensor as it is stored. `rows` selects indices of its first dimension.

        Raises:
            UserError: the file ends before the end of the data.
        """
        file, info = self._file_of[name], self.tensors[name]
        length, *others = info.shape or (1,)  # a scalar is one row
        first, last, _ = rows.indices(length)
        shape = (max(0, last - first), *others) if info.shape else ()
        row_bytes = info.bytes // max(1, length)
        size = max(0, last - first) * row_bytes
        data = self._file(file).read(self._offsets[file][name] + first * row_bytes, size)
        if len(data) < size:
            raise UserError(f"{self.directory / file}: ends within {name}. It was truncated while it was read.")
        return torch.from_numpy(data).view(torch_dtype(info.dtype)).view(shape)

    def read_first(self, name: str, count: int) -> Tensor:
        """Read the first values of a tensor, at most `count`, as a flat tensor."""
        file, info = self._file_of[name], self.tensors[name]
        dtype = torch_dtype(info.dtype)
        data = self._file(file).read(self._offsets[file][name], min(info.bytes, count * dtype.itemsize))
        return torch.from_numpy(data).view(dtype)

    def read_header(self, file: str) -> bytes:
        """Read the bytes of a weight file before the tensors' data."""
        with (self.directory / file).open("rb") as opened:
            length = opened.read(8)
            return length + opened.read(int.from_bytes(length, "little"))

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return list(self._files)

    def names_in(self, file: str) -> list[str]:
        """List the tensors of a weight file, in the order of their bytes. There are no gaps between tensors."""
        return sorted(self._files[file], key=lambda name: (self._offsets[file][name], self.tensors[name].bytes))

    @property
    def weight_bytes(self) -> int:
        """Total size of the weight files."""
        return sum((self.directory / file).stat().st_size for file in self._files)

    def weight_files(self) -> list[Path]:
        """List the weight files, and the index if there is one."""
        files = [self.directory / file for file in self._files]
        has_index = (self.directory / INDEX).is_file() and not is_stale_index(self.directory)
        return [*files, self.directory / INDEX] if has_index else files

    def close(self) -> None:
        """Close the files. The next read opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # False if __init__ failed
            self.close()

    def _file(self, file: str) -> StoredFile:
        if file not in self._open:
            self._open[file] = StoredFile(self.directory / file)
        return self._open[file]


class Checkpoint(TensorFiles):
    """A gpt-oss checkpoint on disk, packed (MXFP4) or plain. The constructor checks files, names and shapes.

    Attributes:
        config: content of config.json.
        shape: sizes of the model, from config.json.
        is_packed: whether the experts are stored as MXFP4 blocks and scales.
    """

    def __init__(self, directory: Path) -> None:
        """Open and check the checkpoint.

        Raises:
            UserError: files, keys of config.json, or tensors are wrong. Several problems are reported together.
        """
        raise_if_other_layout(directory)
        self.config = read_config(directory)
        self.shape = Shape.of(self.config, directory / CONFIG)
        super().__init__(directory)
        self.is_packed = any(is_packed_name(name) for name in self.tensors)
        self._raise_if_not_gpt_oss()

    def read_plain(self, name: str, dtype: torch.dtype = torch.bfloat16, rows: slice = slice(None)) -> Tensor:
        """Read a tensor of the plain layout. `rows` selects indices of its first dimension.

        MXFP4 is decoded. BF16 holds the decoded values exactly.

        Raises:
            UserError: a scale byte is 255 (NaN).
        """
        return self.decode_stored(name, self.read_stored(name, rows), dtype, rows=rows)

    def read_stored(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """Read a tensor of the plain layout as it is stored: either the tensor itself, or its blocks and scales."""
        names = (name,) if name in self.tensors else packed_names(name)
        return tuple(self.read(stored, rows) for stored in names)

    def decode_stored(
        self,
        name: str,
        stored: tuple[Tensor, ...],
        dtype: torch.dtype = torch.bfloat16,
        *,
        rows: slice = slice(None),
        device: str = "cpu",
    ) -> Tensor:
        """Decode the result of `read_stored` to a tensor of the plain layout. Experts become (E, in, out).

        Raises:
            UserError: a scale byte is 255 (NaN).
        """
        if len(stored) == 1:
            plain = stored[0].to(device)
            return plain.float() if plain.dtype == torch.float16 else plain  # the codec does not take float16
        blocks, scales = (tensor.to(device) for tensor in stored)
        self.raise_if_nan(name, scales, rows)
        experts, out_features, nb, half = blocks.shape
        plain = torch.empty((experts, nb * half * 2, out_features), dtype=dtype, device=device)
        decode(blocks, scales, dtype, out=plain.transpose(1, 2))
        return plain

    def raise_if_nan(self, name: str, scales: Tensor, rows: slice = slice(None)) -> None:
        """Check the scales of an expert stack, or only the scales of some experts.

        Args:
            name: name of the stack, for the message.
            scales: scale bytes.
            rows: range of the experts in `scales`.

        Raises:
            UserError: a scale byte is 255 (NaN).
        """
        if (found := find_nan_scales(scales)) is not None:
            expert, row, block = found.first
            _, stored = packed_names(name)
            more = f", the first of {found.count} in the part that was read" if found.count > 1 else ""
            raise UserError(
                f"{self.directory / self._file_of[stored]}: {stored}: {found.kind} at expert"
                f" {expert + (rows.start or 0)}, row {row}, block {block}{more}. The checkpoint is damaged."
            )

    def _raise_if_not_gpt_oss(self) -> None:
        problems = self._size_problems()
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
            raise user_errors([f"{self.directory}: {problem}." for problem in problems], most=MOST_PROBLEMS)

    def _size_problems(self) -> list[str]:
        """If the checkpoint is packed, describe each size that is not a multiple of the block size.

        With such a size, the last weights would be lost.
        """
        sizes = {"hidden_size": self.shape.hidden_size, "intermediate_size": self.shape.intermediate_size}
        return [
            f"{CONFIG}: {name}={size} is not a multiple of {MXFP4.block_size}, the block size of MXFP4"
            for name, size in sizes.items()
            if self.is_packed and size % MXFP4.block_size
        ]

    def expected(self) -> dict[str, TensorInfo]:
        """Return the tensors that the checkpoint must have.

        Each tensor of a plain checkpoint may have any type in PLAIN_TYPES.
        """
        if self.is_packed:
            return packed_tensors(self.shape)
        plain = plain_tensors(self.shape)
        return {
            name: TensorInfo(stored.dtype, info.shape)
            if (stored := self.tensors.get(name)) is not None and stored.dtype in PLAIN_TYPES
            else info
            for name, info in plain.items()
        }


def layout_problems(stored: dict[str, TensorInfo], expected: dict[str, TensorInfo]) -> list[str]:
    """Describe the differences between the stored tensors and the expected ones. Many equal ones are one problem."""
    if (prefix := find_wrapper(stored, expected)) is not None:
        return [
            f"the names of all tensors begin with {prefix!r}, which a wrapper such as PEFT or DDP adds. Save the model"
            " inside the wrapper"
        ]
    found = _group("is missing", "are missing", [name for name in expected if name not in stored])
    found += _group("does not belong there", "do not belong there", [name for name in stored if name not in expected])
    for name, info in expected.items():
        if name in stored and stored[name].shape != info.shape:
            found.append(f"tensor {name} has shape {list(stored[name].shape)}, not {list(info.shape)}")
        elif name in stored and stored[name].dtype != info.dtype:
            found.append(f"tensor {name} has type {stored[name].dtype}, not {info.dtype}")
    return found


def _group(one: str, many: str, names: list[str]) -> list[str]:
    """Return one problem for each tensor, or one problem for all of them if there are many."""
    if len(names) <= MOST_PROBLEMS:
        return [f"tensor {name} {one}" for name in names]
    return [f"{len(names)} tensors {many}: {_first(names)}"]


def _first(names: list[str]) -> str:
    """List the first names, and count the rest."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _stored_files(directory: Path) -> dict[str, dict[str, TensorInfo]]:
    """Check the weight files, and map each file to its tensors. If there is an index, it must match the files."""
    present = sorted(p.name for p in directory.glob("*.safetensors") if p.name != ADAPTER_WEIGHTS)
    weight_map = None if is_stale_index(directory) else _weight_map(directory)
    listed = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    if weight_map is None and not present:
        raise UserError(f"{directory}: has no weights: neither {INDEX} nor {SINGLE}. {describe_weights(directory)}.")
    problems = _missing_files(directory, [name for name in listed if name not in present], len(listed))
    problems += _unlisted_files(directory, [name for name in present if name not in listed], weight_map)
    files, pointers = {}, []
    for name in (n for n in listed if n in present):
        try:
            files[name] = _read_header(directory / name)
        except (SafetensorError, OSError) as error:
            if isinstance(error, SafetensorError) and is_lfs_pointer(directory / name):
                pointers.append(name)
            else:
                problems.append(f"{directory / name}: damaged or truncated ({error}). Fetch it again.")
        except UserError as error:
            problems.append(str(error))
    if pointers:
        problems.append(
            f"{directory}: {len(pointers)} weight files are pointers of Git LFS ({_first(pointers)}). Fetch the files"
            f" themselves: git -C {directory} lfs pull"
        )
    if weight_map is not None and not problems:
        problems = _index_problems(directory, weight_map, files)
    if problems:
        raise user_errors(problems, most=MOST_PROBLEMS)
    return files


def _missing_files(directory: Path, missing: list[str], count: int) -> list[str]:
    if len(missing) < 2:
        return [f"{directory}: weight file {name} is missing. Fetch it again." for name in missing]
    return [f"{directory}: {len(missing)} of {count} weight files are missing: {_first(missing)}. Fetch them again."]


def _unlisted_files(directory: Path, names: list[str], weight_map: dict[str, str] | None) -> list[str]:
    """Describe weight files that are not read. transformers prefers a single file, and some engines read all files."""
    listed = SINGLE if weight_map is None else f"the files in {INDEX}"
    return [
        f"{directory / name}: lies beside {listed}, and programs do not agree on which of them to load. Move the"
        " weights that you do not want, and their index, to another directory."
        for name in names
    ]


def _weight_map(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    if not path.is_file():
        return None
    try:
        weight_map = read_json(path)["weight_map"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable index ({error!r}). Fetch it again.") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: not a readable index (weight_map is {weight_map!r:.100}). Fetch it again.")
    outside = sorted({str(f) for f in weight_map.values() if not isinstance(f, str) or Path(f).name != f})
    if outside:
        raise UserError(f"{path}: names files outside its directory: {', '.join(outside[:3])}.")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Map each tensor's name to its type and shape.

    safetensors checks lengths, offsets, overlaps, gaps and the end of the file.

    Raises:
        SafetensorError: the file is damaged.
        UserError: see `_data_offsets`, or the file is not a regular file.
    """
    _raise_if_long_header(path)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        infos = {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    _data_offsets(path)
    return infos


def _data_offsets(path: Path) -> dict[str, int]:
    """Map each tensor's name to the position of its data in the file.

    Reading rows needs these positions, because safetensors can read rows only by mapping the file.

    Raises:
        UserError: the header is nested too deeply, or has two tensors with the same name. Programs do not agree on
            which of them to read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            pairs = parse_json(file.read(length), hook=list)
        except ValueError as error:
            raise UserError(f"{path}: its header is damaged ({error}). Fetch it again.") from error
    twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    if twice:
        raise UserError(f"{path}: holds {', '.join(twice[:3])} twice. Fetch it again.")
    return {name: 8 + length + dict(entry)["data_offsets"][0] for name, entry in pairs if name != "__metadata__"}


def _raise_if_long_header(path: Path) -> None:
    """Check the length of a header before it is read. A short file is left to safetensors."""
    raise_if_irregular(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if _MOST_HEADER_BYTES < length <= path.stat().st_size:
        raise UserError(f"{path}: its header has {length:,} bytes. A header has at most {_MOST_HEADER_BYTES:,}.")


def _index_problems(directory: Path, weight_map: dict[str, str], files: dict[str, dict[str, TensorInfo]]) -> list[str]:
    stored = {(name, file) for file, tensors in files.items() for name in tensors}
    listed = set(weight_map.items())
    wrong, unlisted = sorted(listed - stored), sorted(stored - listed)
    if len(wrong) + len(unlisted) > MOST_PROBLEMS:
        return [
            f"{directory / INDEX}: does not match the weight files. {len(wrong)} tensors are not in the files that it"
            f" names ({_first([name for name, _ in wrong]) or 'none'}), and it does not list {len(unlisted)} tensors"
            f" ({_first([name for name, _ in unlisted]) or 'none'}). Fetch it again."
        ]
    return [f"{directory / INDEX}: says that {name} is in {file}, but it is not." for name, file in wrong] + [
        f"{directory / file}: holds {name}, which is not in {INDEX}." for name, file in unlisted
    ]
