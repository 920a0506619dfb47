"""Write and read artifact.json, the record of a complete stage, and compute fingerprints of directories.

A stage's directory is complete if and only if it has an artifact.json. Fingerprints depend on
contents alone. So if a stage is rebuilt with the same result, later stages stay up to date.
"""

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from pipeline import __version__
from pipeline.config import Stage
from pipeline.config.secrets import without_secrets
from pipeline.errors import UserError
from pipeline.runs.commands import locate, rebuild_command, recorded
from pipeline.runs.console import progress
from pipeline.runs.foreign_files import parse_json
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.records import Record, StageRecord
from pipeline.runs.settings import Settings
from pipeline.runs.yaml_files import read_yaml

ARTIFACT_FILE = "artifact.json"
CONFIG_FILE = "config.yaml"
UNFINISHED_FILE = "unfinished.json"
SHARDS_FILE = "shards.json"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS_DIR = "checkpoints"
WHOLE_FILE = "whole"
"""Name of a file that every complete training checkpoint has. It records the sharding, and the other files."""

ARTIFACT_VERSION = 2
"""Version of the format of artifact.json. Version 1 has no `version` and no `digests`.

Raise it when a field changes its meaning, and add the way from the earlier version to `_migrate`.
"""

BOOKKEEPING = {ARTIFACT_FILE, CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, UNFINISHED_FILE, SHARDS_FILE}
RECORDS = (CONFIG_FILE, METRICS_FILE, SAMPLES_FILE)
"""Files beside the payload whose digests artifact.json also holds. They are not part of the fingerprint."""
MODEL_STAGES = (Stage.upcast, Stage.sft, Stage.quantize, Stage.qat)
"""Stages whose result is a model to train or export, in order. Runs can share these stages through `base_run`."""
EVALUATED_STAGES = (*MODEL_STAGES, Stage.export)
"""Stages whose result is a model to evaluate, in order."""
_READ_BYTES = 1 << 24
_MARKS = (f"/{ARTIFACT_FILE}", f"/{UNFINISHED_FILE}")


class Kind(Enum):
    """The kind of result in a stage's directory. `foreign` is a model in a layout that transformers does not load."""

    checkpoint = "checkpoint"
    adapter = "adapter"
    packed = "packed"
    foreign = "foreign"
    report = "report"


@dataclass(frozen=True)
class Result:
    """Description of a stage's payload. The stage returns it after it has written the payload.

    Attributes:
        kind: kind of the payload.
        record: figures of the stage, for later stages and reports.
        format: format of the experts' weights in the payload: a name in FORMATS, or a type such as bfloat16. None if
            there are no weights.
        fake_quantized: format to which the forward pass rounds the experts' weights. This is a name in FORMATS. None if
            nothing is rounded.
        scale_rule: rule that chooses the scales, for `fake_quantized` or for a packed `format`. None if there is
            neither.
        digests: hashes (XXH3-128) of files, keyed by the file's name. `work` computed them while it wrote the files.
    """

    kind: Kind
    record: StageRecord
    format: str | None = None
    fake_quantized: str | None = None
    scale_rule: str | None = None
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A complete stage: its directory, and the fields of its artifact.json.

    `files` maps the payload's files to their sizes in bytes. `digests` maps the files, and those of `RECORDS`, to their
    XXH3-128. It is empty in artifacts of version 1.
    """

    directory: Path
    stage: str
    kind: Kind
    format: str | None
    fake_quantized: str | None
    scale_rule: str | None
    fingerprint: str
    parents: dict[str, str]
    settings: Settings
    files: dict[str, int]
    details: dict[str, Any]
    base_model: dict[str, Any]
    data: str | None
    version: int = ARTIFACT_VERSION
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def base_directory(self) -> Path:
        """The directory of the full checkpoint: this one, or for adapters the one that `details.base` names.

        The path in `details.base` starts at the run's directory. The stage's directory may be a link to another run's,
        as in a control. Then the path may start at that run.
        """
        base = self.details.get("base")
        if base is None:
            return self.directory
        beside = self.directory.parent / str(base)
        return beside if beside.is_dir() else self.directory.resolve().parent / str(base)

    @property
    def run_directory(self) -> Path:
        """Directory of the run. A part of a stage (`export/gguf`) lies one level deeper than a stage."""
        is_part = self.directory.parent.name == self.stage != self.directory.name
        return self.directory.parent.parent if is_part else self.directory.parent

    def read(self, kind: type[Record]) -> Record:
        """Return the stage's record.

        Raises:
            UserError: artifact.json lacks a field of the record.
        """
        try:
            return kind.from_details(self.details)
        except KeyError as error:
            raise UserError(
                f"{self.directory / ARTIFACT_FILE}: has no details.{error.args[0]}. {advise_rebuild(self.directory)}"
            ) from error


def load(directory: Path, check_files: bool = True, remedy: str | None = None) -> Artifact:
    """Read a complete stage's artifact.json, and check that all of its files are there with their recorded sizes.

    Errors end with `remedy`. The default advice is to run the stage again.

    Raises:
        UserError: artifact.json is missing or unreadable or has a newer version, or a file is missing or has another
            size.
    """
    path = directory / ARTIFACT_FILE
    try:
        record = _migrate(parse_json(path.read_text(encoding="utf-8")), path)
        _raise_if_wrong_types(record)
        record["settings"] = without_secrets(record["settings"])  # as settings are compared
        known = {item.name for item in dataclasses.fields(Artifact)} - {"directory", "kind"}
        artifact = Artifact(directory, kind=Kind[record["kind"]], **{name: record[name] for name in known})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable artifact ({error}). {remedy or advise_rebuild(directory)}") from error
    for name, size in artifact.files.items() if check_files else ():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            state = "changed in size since it was written" if file.is_file() else "missing"
            raise UserError(f"{file}: {state}. {remedy or advise_rebuild(directory)}")
    if check_files:
        _read[directory] = artifact
    return artifact


def read_config(directory: Path) -> Any:
    """Return the content of config.yaml in a stage's directory.

    Raises:
        UserError: the file cannot be read.
    """
    path = directory / CONFIG_FILE
    try:
        return read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). {advise_rebuild(directory)}") from error


def advise_rebuild(directory: Path) -> str:
    """Return the advice for a damaged stage."""
    command, place = rebuild_command(directory), locate(directory)
    made = [] if place is None else [*place.target, *recorded(directory, place.stage)]
    stage = "its stage" if place is None else shlex.join([f"stage={place.stage.name}", *made])
    return f"Run {stage} again with overwrite=true." if command is None else f"Rebuild it: {command}"


def _raise_if_wrong_types(record: dict[str, Any]) -> None:
    """Raise ValueError if a field of artifact.json has another type than `Artifact`."""
    kinds: dict[str, type] = {"stage": str, "kind": str, "fingerprint": str}
    kinds |= dict.fromkeys(("parents", "settings", "files", "digests", "details", "base_model"), dict)
    for name, kind in kinds.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{name} is {record[name]!r:.80}, which is of the wrong type")
    if wrong := [name for name, size in record["files"].items() if type(size) is not int or "\0" in name]:
        raise ValueError(f"files: {wrong[0]!r:.80} has no size")


_read: dict[Path, Artifact] = {}


def take_read() -> list[Artifact]:
    """Return the artifacts that `load` has checked since the last call. They are the inputs of the stage that runs."""
    found = list(_read.values())
    _read.clear()
    return found


def _migrate(record: Any, path: Path) -> dict[str, Any]:
    """Return the record of artifact.json in the form of this version.

    Raises:
        UserError: a newer version of the program wrote it.
        ValueError, KeyError: it is not such a record.
    """
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not an object")
    version = record.get("version", 1)
    if not isinstance(version, int) or version < 1:
        raise ValueError(f"version is {version!r}")
    raise_if_newer(path, version, record.get("program"))
    return {**record, "version": version, "digests": {} if version == 1 else record["digests"]}


def raise_if_newer(path: Path, version: int, program: str | None) -> None:
    """Raise UserError if a record has a newer version than this program writes.

    Args:
        path: file of the record.
        version: version of the record.
        program: version of the program that wrote the record, or None if it is unknown.
    """
    if version > ARTIFACT_VERSION:
        raise UserError(
            f"{path}: made by a newer version{f' {program}' if program else ''} of this program. Its format has version"
            f" {version}, and this program ({__version__}) reads versions up to {ARTIFACT_VERSION}. Upgrade the"
            " program, or set another run_dir."
        )


class Contents(NamedTuple):
    """Files of a directory: their fingerprint, and the size in bytes and the XXH3-128 of each."""

    fingerprint: str
    sizes: dict[str, int]
    digests: dict[str, str]


def fingerprint_of(directory: Path, known: dict[str, str] | None = None) -> Contents:
    """Return the fingerprint of a payload, and the size and digest of each file.

    The fingerprint is the XXH3-128 of the files' names, sizes and digests. A directory inside this one that is itself
    the result of a stage does not count, as in `export/`, which has `export/<target>/`.

    Args:
        directory: directory of a stage, or any other directory.
        known: hashes (XXH3-128) of files, keyed by the file's name. These files are not read again.
    """
    known = known or {}
    payload = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    inner = tuple(f"{Path(name).parent.as_posix()}/" for name in payload if name.endswith(_MARKS))
    own = [name for name in sorted(payload) if _is_payload(name) and not name.startswith(inner)]
    sizes = {name: payload[name].stat().st_size for name in own}
    digests = {name: digest for name, digest in known.items() if name in sizes}
    unread = {name: size for name, size in sizes.items() if name not in digests}
    with progress(total=sum(unread.values()), what="fingerprint", unit="B") as bar:
        for name in unread:
            digests[name] = digest_of(payload[name], bar.update)
    text = "".join(f"{name}\0{size}\0{digests[name]}\0" for name, size in sizes.items())
    return Contents(xxhash.xxh3_128_hexdigest(text.encode()), sizes, digests)


def digests_of(directory: Path) -> dict[str, str]:
    """Return the XXH3-128 of each file below a directory, keyed by the file's path in the directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): digest_of(path) for path in files}


def digest_of(path: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """Return the XXH3-128 of a file. `advance` gets the number of bytes that were read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _is_payload(name: str) -> bool:
    written = name.removesuffix(".tmp")
    is_bookkeeping = written in BOOKKEEPING or written.endswith(f"/{SHARDS_FILE}")
    return not is_bookkeeping and not name.startswith(f"{CHECKPOINTS_DIR}/")
