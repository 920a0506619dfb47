"""Finds data sets: files, folders, saved data sets, data sets on the hub, and the synthetic data set.

Each row is returned unchanged, together with its place. Other modules interpret the rows.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import datasets
import xxhash
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.exceptions import DatasetsError

from pipeline.config import SYNTHETIC, DataConfig, DataPartConfig, ValidationConfig
from pipeline.config.hub_ids import is_hub_id
from pipeline.data import demo_rows, files, folders, synthetic
from pipeline.data.files import KINDS, ArrowRow, PlacedRows, number_rows
from pipeline.errors import UserError
from pipeline.runs.foreign_files import MISSING, describe_irregular

_READ_BYTES = 1 << 24
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """One data set: `data` itself, a part of `data.blend`, or `data.validation`.

    Attributes:
        key: key of the data set's settings, for messages. Examples: `data`, `data.blend[0]`.
        data: settings of the data set. Unset settings of a part or of `data.validation` are inherited from `data`. The
            revision is inherited only with the path, because another repository does not have it.
        weight: share of the blend, relative to the weights of the other parts.
        reasoning_effort: default for the rows of this part. None means the default of `data`.
        reasoning_language: default for the rows of this part. None means the default of `data`.
        expected: name of a value that scorers need -> column that holds the value.
        expected_key: key of the setting that names such a column, for messages. In the key, {} stands for the name of
            the value.
        needs_answers: whether each row must have an answer. Training rows need answers; evaluation prompts do not.
        validates: whether the rows are for validation alone.
    """

    key: str
    data: DataConfig
    weight: float = 1.0
    reasoning_effort: str | None = None
    reasoning_language: str | None = None
    expected: dict[str, str] = field(default_factory=dict)
    expected_key: str = "evaluate.prompts.expected.{}"
    needs_answers: bool = True
    validates: bool = False


@dataclass(frozen=True)
class Opened:
    """A data set that `open_rows` found.

    Attributes:
        identity: digest of the files' bytes, or the commit on the hub. The identity changes whenever the rows change.
        rows: function that returns a new iterator over all rows.
    """

    identity: str
    rows: Callable[[], PlacedRows]


def data_sources(data: DataConfig) -> list[Source]:
    """List the data sets that the configuration names. A data set for validation is the last one.

    Raises:
        UserError: the configuration names no data set, or a revision for a whole blend.
    """
    if data.path is None and not data.blend:
        raise UserError("data.path: is not set. Give data.path=<file, folder or hub id>, or choose a recipe.")
    if data.blend and data.revision is not None:
        raise UserError(
            f"data.revision={data.revision!r}: belongs to data.path. Set the revision in the parts of data.blend."
        )
    found = [_part(f"data.blend[{i}]", data, part.path, part, part.weight) for i, part in enumerate(data.blend)]
    found = found or [Source("data", data)]
    if data.validation.is_set:
        path = data.validation.path or str(data.path)
        found.append(replace(_part("data.validation", data, path, data.validation), validates=True))
    return found


def with_expected(sources: list[Source], expected: dict[str, str], key: str = Source.expected_key) -> list[Source]:
    """Return the data sets, with columns for scorers in the data sets that can have validation rows.

    Args:
        sources: result of `data_sources`.
        expected: see `Source`.
        key: see `Source.expected_key`.
    """
    any_validates = any(source.validates for source in sources)
    return [
        replace(source, expected=expected, expected_key=key) if source.validates or not any_validates else source
        for source in sources
    ]


def open_rows(source: Source, directory: Path) -> Opened:
    """Find a data set, and compute the identity of its contents.

    Args:
        source: the data set.
        directory: directory for the files of generated rows. A file is written when its rows are read.

    Raises:
        UserError: the data set does not exist, or its format is not supported. Reading the rows later may also raise
            UserError.
    """
    name = str(source.data.path)
    if name.startswith(SYNTHETIC):
        return _open_synthetic(source, name.removeprefix(SYNTHETIC), directory)
    path = Path(name).expanduser()
    if (kind := describe_irregular(path)) is None:
        return _open_file(source, path)
    if path.is_dir():
        return _open_folder(source, path)
    if kind != MISSING:
        raise UserError(f"{source.key}.path={name:.300}: {kind}. Give {KINDS}.")
    if not is_hub_id(name, needs_owner=False):
        raise UserError(f"{source.key}.path={name}: no such file or folder.")
    return _open_stream(source, name) if source.data.streaming else _open_download(source, name)


def _part(key: str, data: DataConfig, path: str, part: DataPartConfig, weight: float = 1.0) -> Source:
    names = ("revision", "split", "streaming", "columns", "roles", "filter")
    own = {name: value for name in names if (value := getattr(part, name)) is not None}
    own.setdefault("revision", data.revision if path == data.path else None)
    effort = part.reasoning_effort.name if part.reasoning_effort is not None else None
    settings = replace(data, path=path, blend=[], validation=ValidationConfig(), **own)
    return Source(key, settings, weight, effort, part.reasoning_language)


def _open_synthetic(source: Source, name: str, directory: Path) -> Opened:
    path, split = f"{SYNTHETIC}{name}", source.data.split
    if name == "arithmetic":
        return Opened(digest_of_code(Path(synthetic.__file__)), lambda: number_rows(path, synthetic.arithmetic_rows()))
    if name not in demo_rows.DATA_SETS:
        names = ", ".join(f"{SYNTHETIC}{each}" for each in ("arithmetic", *demo_rows.DATA_SETS))
        raise UserError(f"{source.key}.path={path!r}: no such synthetic data set. Use one of {names}.")
    made = demo_rows.DATA_SETS[name]
    if split not in made.sizes:
        raise UserError(f"{source.key}.split={split!r}: {path} has the splits {', '.join(made.sizes)}.")
    return Opened(digest_of_code(*made.code), lambda: files.read_file(demo_rows.write(directory, name, split), split))


def _open_file(source: Source, path: Path) -> Opened:
    files.raise_if_other_format(source.key, path)
    return Opened(digest_of_files([path]), lambda: files.read_file(path, source.data.split))


def _open_folder(source: Source, path: Path) -> Opened:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        kept = sorted(p for p in path.rglob("*") if p.is_file())
        return Opened(digest_of_files(kept), lambda: number_rows(str(path), _saved_rows(source, path)))
    chosen = folders.choose_files(source.key, path, source.data.split)
    for file in chosen:
        files.raise_if_other_format(source.key, file)
    split = source.data.split
    return Opened(
        digest_of_files(chosen), lambda: (placed for file in chosen for placed in files.read_file(file, split))
    )


def _open_download(source: Source, hub_id: str) -> Opened:
    """Download a hub data set into the cache of `datasets`, and open it through a memory map."""
    from datasets.fingerprint import Hasher

    fetched = _load_from_hub(source, hub_id)
    files = [Path(entry["filename"]) for entry in fetched.cache_files]
    # If HF_DATASETS_IN_MEMORY_MAX_SIZE is set, small data sets are read into memory and have no cache files.
    identity = digest_of_files(files) if files else Hasher.hash(list(fetched))
    return Opened(identity, lambda: number_rows(_place(source, hub_id), _arrow_rows(fetched)))


def _open_stream(source: Source, hub_id: str) -> Opened:
    commit = _resolve_commit(source, hub_id)
    pinned = replace(source, data=replace(source.data, revision=commit))
    return Opened(commit, lambda: number_rows(_place(source, hub_id), _arrow_rows(_stream_rows(pinned, hub_id))))


def _arrow_rows(rows: Iterable[Mapping[str, object]]) -> Iterator[ArrowRow]:
    return map(ArrowRow, rows)


def _stream_rows(source: Source, hub_id: str) -> Iterator[Mapping[str, object]]:
    try:
        yield from _load_from_hub(source, hub_id)
    except (DatasetsError, OSError) as error:
        raise UserError(
            f"{source.key}.path={hub_id}: the hub stopped sending rows ({_first_line(error)}). Run the same command"
            f" again, or set {source.key}.streaming=false to fetch the files first."
        ) from error


def _place(source: Source, hub_id: str) -> str:
    return f"{hub_id} ({source.data.split})"


def _resolve_commit(source: Source, hub_id: str) -> str:
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError

    revision = source.data.revision
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        return str(dataset_info(hub_id, revision=revision).sha)
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise _not_on_hub(source, error) from error


def _load_from_hub(source: Source, hub_id: str) -> Dataset | IterableDataset:
    data = source.data
    try:
        return datasets.load_dataset(hub_id, split=data.split, revision=data.revision, streaming=data.streaming)
    except (DatasetsError, ValueError, OSError) as error:
        raise _not_on_hub(source, error) from error


def _not_on_hub(source: Source, error: Exception) -> UserError:
    return UserError(
        f"{source.key}.path={source.data.path!r}, {source.key}.split={_shown(source.data.split)}: no such file or"
        f" folder, and the hub cannot be reached or does not have it ({_first_line(error)})."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _saved_rows(source: Source, path: Path) -> Iterator[ArrowRow]:
    loaded = _load_saved(source, path)
    try:
        yield from _arrow_rows(loaded)
    except Exception as error:  # as in `_load_saved`
        raise _not_readable(path, error) from error


def _not_readable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a readable saved data set ({type(error).__name__}: {_first_line(error)}).")


def _load_saved(source: Source, path: Path) -> Dataset:
    split = source.data.split
    try:
        loaded = datasets.load_from_disk(str(path))
    except IndexError as error:  # datasets 5.2 raises IndexError for a data set without rows
        raise UserError(f"{source.key}.path={path}: the data set is empty.") from error
    except Exception as error:  # for damaged files, datasets 5.2 raises any kind of error
        raise _not_readable(path, error) from error
    if not isinstance(loaded, DatasetDict):
        return loaded
    if split not in loaded:
        raise UserError(f"{source.key}.split={split}: {path} has the splits {', '.join(loaded)}.")
    return loaded[split]


def digest_of_files(files: list[Path]) -> str:
    """Return the XXH3-128 hash of the files' names, sizes and bytes. Hashing is much faster than parsing the rows.

    Raises:
        UserError: a file cannot be read.
    """
    hashed = xxhash.xxh3_128()
    for path in files:
        try:
            hashed.update(f"{path.absolute()}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while chunk := file.read(_READ_BYTES):
                    hashed.update(chunk)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    return hashed.hexdigest()


@cache
def digest_of_code(*files: Path) -> str:
    """Return `digest_of_files` of modules of this program, computed once. A process does not load them again."""
    return digest_of_files(list(files))


def _shown(value: str | None) -> str:
    """Return a value as the command line writes it."""
    return "null" if value is None else repr(value)
