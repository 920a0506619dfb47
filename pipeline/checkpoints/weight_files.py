"""Finds the weight files of a directory, and reads their headers and their index.

The files come from others. So names, lengths and offsets are checked before any data are read.
"""

from collections import Counter
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pipeline.checkpoints.gpt_oss import TensorInfo
from pipeline.checkpoints.recognition import describe_weights, is_lfs_pointer, is_stale_index
from pipeline.checkpoints.shards import INDEX, SINGLE
from pipeline.checkpoints.side_files import ADAPTER_WEIGHTS
from pipeline.errors import MOST_PROBLEMS, UserError, list_first, user_errors
from pipeline.runs.foreign_files import parse_json, raise_if_irregular, read_json

_MOST_HEADER_BYTES = 1 << 24  # the headers of the released models have less than 64 KiB


def stored_files(directory: Path) -> dict[str, dict[str, TensorInfo]]:
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
            f"{directory}: {len(pointers)} weight files are pointers of Git LFS ({list_first(pointers)}). Fetch the"
            f" files themselves: git -C {directory} lfs pull"
        )
    if weight_map is not None and not problems:
        problems = _index_problems(directory, weight_map, files)
    if problems:
        raise user_errors(problems, most=MOST_PROBLEMS)
    return files


def _missing_files(directory: Path, missing: list[str], count: int) -> list[str]:
    if len(missing) < 2:
        return [f"{directory}: weight file {name} is missing. Fetch it again." for name in missing]
    return [
        f"{directory}: {len(missing)} of {count} weight files are missing: {list_first(missing)}. Fetch them again."
    ]


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
        raise UserError(f"{path}: names files outside its directory: {list_first(outside)}.")
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Map each tensor's name to its type and shape.

    safetensors checks lengths, offsets, overlaps, gaps and the end of the file.

    Raises:
        SafetensorError: the file is damaged.
        UserError: see `data_offsets`, or the file is not a regular file.
    """
    _raise_if_long_header(path)
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        infos = {name: TensorInfo(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    data_offsets(path)
    return infos


def data_offsets(path: Path) -> dict[str, int]:
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
        raise UserError(f"{path}: holds {list_first(twice)} twice. Fetch it again.")
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
            f" names ({list_first([name for name, _ in wrong]) or 'none'}), and it does not list {len(unlisted)}"
            f" tensors ({list_first([name for name, _ in unlisted]) or 'none'}). Fetch it again."
        ]
    return [f"{directory / INDEX}: says that {name} is in {file}, but it is not." for name, file in wrong] + [
        f"{directory / file}: holds {name}, which is not in {INDEX}." for name, file in unlisted
    ]
