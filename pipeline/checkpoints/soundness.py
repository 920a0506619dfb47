"""Check the weights of a base checkpoint for NaN and Inf, which training would report late and blame on its settings.

Every byte is checked where every byte is read anyway. `scan` also hashes the files, so a checkpoint that is linked is
read once, as it would be for its digests alone.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
import xxhash
from torch import Tensor

from pipeline.checkpoints.gpt_oss import SCALES_SUFFIX
from pipeline.checkpoints.non_finite import NonFinite, find_nan_scales, find_non_finite
from pipeline.checkpoints.reading import TensorFiles
from pipeline.checkpoints.shards import STEP_BYTES, Part, Piece, Step, make_parts
from pipeline.errors import MOST_PROBLEMS, MachineError, user_errors
from pipeline.runs.console import progress

SAMPLED_VALUES = 1 << 19
"""Number of values of each tensor that `raise_if_sample_bad` reads: 1 MiB of BF16."""

_REMEDY = "The checkpoint is damaged. Fetch the file again."


def scan(files: TensorFiles) -> dict[str, str]:
    """Read every byte of the weight files once: look for NaN and Inf, and hash the files.

    Returns:
        Name of each file -> XXH3-128 of its bytes.

    Raises:
        UserError: tensors have NaN or Inf. The message names each tensor, its first such value and their number.
    """
    digests, problems = {}, []
    with progress(total=files.weight_bytes, what="checking", unit="B") as bar:
        for file in files.files:
            found, digest = _Findings(), xxhash.xxh3_128(files.read_header(file))
            names = files.names_in(file)
            for name, values in make_parts([_whole_file(files, names)] if names else []):
                digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
                found.add(name, values)
                bar.update(values.nbytes)
            digests[file] = digest.hexdigest()
            problems += [f"{files.directory / file}: {each}. {_REMEDY}" for each in found.describe()]
    if problems:
        raise user_errors(problems, most=MOST_PROBLEMS)
    return digests


def raise_if_sample_bad(files: TensorFiles) -> None:
    """Look for NaN and Inf in the first values of each tensor.

    Raises:
        UserError: there is one. The message names each tensor, its first such value and their number in the sample.
    """
    problems = []
    for file in files.files:
        found = _Findings()
        for name in files.names_in(file):
            found.add(name, files.read_first(name, SAMPLED_VALUES), files.tensors[name].shape)
        problems += [f"{files.directory / file}: {each} of a sample. {_REMEDY}" for each in found.describe()]
    if problems:
        raise user_errors(problems, most=MOST_PROBLEMS)


def add_checking(piece: Piece, files: TensorFiles) -> Piece:
    """Return a piece that makes the same tensors, and checks them for NaN and Inf on their device.

    With a finding, all of `files` is scanned, so that the error names every tensor.
    """

    def checked(step: Step) -> Step:
        def convert(inputs: object) -> Iterator[Part]:
            for name, values in step.convert(inputs):
                if _find(name, values) is not None:
                    scan(files)
                    raise MachineError(
                        f"{files.directory}: {name} has NaN or Inf, but not when it is read again. The disk or the"
                        " memory is failing."
                    )
                yield name, values

        return Step(step.read, convert)

    return Piece(piece.tensors, lambda: map(checked, piece.steps()), piece.note)


class _Findings:
    """NaN and Inf of tensors that come in parts, in the order of their rows."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._found: dict[str, NonFinite] = {}

    def add(self, name: str, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
        """Check the next rows of a tensor. With `shape`, `values` are the first values of such a tensor, flat."""
        first_row = self._rows.get(name, 0)
        self._rows[name] = first_row + (len(values) if values.dim() else 1)
        if (found := _find(name, values)) is None:
            return
        if shape is not None:
            place = _unravel(found.first[0], shape)
        else:
            place = [row + first_row * (axis == 0) for axis, row in enumerate(found.first)]
        before = self._found.get(name, NonFinite(0, place, found.kind))
        self._found[name] = replace(before, count=before.count + found.count)

    def describe(self) -> Iterator[str]:
        """Yield a description of the findings of each tensor."""
        for name, found in self._found.items():
            more = f", the first of {found.count} values that are NaN or Inf" if found.count > 1 else ""
            yield f"{name}: {found.kind} at {_place(name, found.first)}{more}"


def _find(name: str, values: Tensor) -> NonFinite | None:
    if name.endswith(SCALES_SUFFIX):
        return find_nan_scales(values)
    return find_non_finite(values) if values.is_floating_point() else None


def _place(name: str, index: list[int]) -> str:
    if name.endswith(SCALES_SUFFIX) and len(index) == 3:
        return "expert {}, row {}, block {}".format(*index)
    return f"index {index}"


def _unravel(position: int, shape: tuple[int, ...]) -> list[int]:
    sizes = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return [position // size % length for size, length in zip(sizes, shape, strict=True)]


def _whole_file(files: TensorFiles, names: list[str]) -> Piece:
    """Make a piece that reads the tensors of a file in the order of their bytes, some rows at a time."""

    def step(name: str, rows: slice) -> Step:
        return Step(lambda: files.read(name, rows), lambda values: [(name, values)])

    def steps() -> Iterator[Step]:
        for name in names:
            info = files.tensors[name]
            length = info.shape[0] if info.shape else 1
            count = max(1, STEP_BYTES * length // max(1, info.bytes))
            for start, end in pairwise([*range(0, length, count), length]):
                yield step(name, slice(start, end))

    return Piece({name: files.tensors[name] for name in names}, steps)
