"""Opens and checks checkpoints, and reads whole tensors or rows of them.

Data is read into memory, not mapped. So a file that shrinks during reading raises an error instead of crashing the
process. A tensor uses memory only while the caller keeps it. Several threads can read at the same time.
"""

from pathlib import Path

import torch
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
    find_wrapper,
    is_stale_index,
    raise_if_other_layout,
)
from pipeline.checkpoints.shards import INDEX
from pipeline.checkpoints.weight_files import data_offsets, stored_files
from pipeline.errors import MOST_PROBLEMS, UserError, list_first, user_errors
from pipeline.numerics.codec import decode
from pipeline.numerics.formats import MXFP4


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
        self._files = stored_files(directory)
        self.tensors = {name: info for tensors in self._files.values() for name, info in tensors.items()}
        self._file_of = {name: file for file, tensors in self._files.items() for name in tensors}
        self._offsets = {file: data_offsets(directory / file) for file in self._files}
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
    return [f"{len(names)} tensors {many}: {list_first(names)}"]
