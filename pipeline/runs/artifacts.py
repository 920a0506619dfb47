"""The directory that a stage leaves behind. It is complete if and only if it has an artifact.json.

`build` runs a stage: it finds out whether the directory is new, unfinished, up to date or changed, lets the stage
work, and writes artifact.json last and atomically. Fingerprints depend on contents alone. A stage that is rebuilt with
the same result therefore leaves later stages up to date.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import xxhash
from omegaconf import OmegaConf

from pipeline.config import PipelineConfig, QuantizeSource, Stage
from pipeline.errors import UserError
from pipeline.runs import provenance
from pipeline.runs.commands import stage_command
from pipeline.runs.console import progress, say
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import is_main_process, wait_for_everyone
from pipeline.runs.tracking import followed

ARTIFACT_FILE = "artifact.json"
CONFIG_FILE = "config.yaml"
UNFINISHED_FILE = "unfinished.json"
SHARDS_FILE = "shards.json"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS_DIR = "checkpoints"

BOOKKEEPING = {ARTIFACT_FILE, CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, UNFINISHED_FILE, SHARDS_FILE}
MODEL_STAGES = (Stage.upcast, Stage.sft, Stage.quantize, Stage.qat)
"""Stages that leave a model to train or to export, in order. Runs can share these stages through `base_run`."""
EVALUATED_STAGES = (*MODEL_STAGES, Stage.export)
"""Stages that leave a model to evaluate, in order."""
_READ_BYTES = 1 << 24


class Kind(Enum):
    """What a stage's directory holds. `foreign` is a model in a layout that transformers does not load."""

    checkpoint = "checkpoint"
    adapter = "adapter"
    packed = "packed"
    foreign = "foreign"
    report = "report"


@dataclass(frozen=True)
class Result:
    """A stage's own description of the payload that it has written.

    Attributes:
        kind: of the payload.
        format: number format of the experts' weights in the payload, or None for a report.
        fake_quantized: name in FORMATS of the format that the forward pass rounds the experts' weights to, or None.
        scale_rule: how `fake_quantized`, or a packed `format`, chooses its scales, or None.
        details: figures worth keeping: counts, losses, sizes.
        digests: file -> XXH3-128 of its bytes, for files that `work` hashed while it wrote them.
    """

    kind: Kind
    format: str | None = None
    fake_quantized: str | None = None
    scale_rule: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A complete stage: its directory, and the fields of its artifact.json."""

    directory: Path
    stage: str
    kind: Kind
    format: str | None
    fake_quantized: str | None
    scale_rule: str | None
    fingerprint: str
    parents: dict[str, str]
    settings: dict[str, Any]
    files: dict[str, int]
    details: dict[str, Any]
    base_model: dict[str, Any]
    data: str | None


def build(
    config: PipelineConfig,
    stage: Stage,
    *,
    settings: tuple[str, ...],
    parents: dict[str, str],
    work: Callable[[Path], Result],
    data: str | None = None,
    resumable_as: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    on_every_process: bool = False,
    is_report: bool = False,
) -> Artifact:
    """Run `work` unless the stage is up to date, and publish the payload that it leaves in the stage's directory.

    Args:
        config: the resolved configuration.
        stage: whose directory it is.
        settings: dotted keys (or sections) of the configuration that the result depends on.
        parents: name -> fingerprint of each input.
        work: fills the given directory, in which it finds the files of an interrupted run with the same inputs.
        data: fingerprint of the data set, or None if the stage uses none.
        resumable_as: maps the chosen settings to those that an unfinished stage must be resumed with; None: all.
        on_every_process: call `work` on every process (training), not on the main process alone.
        is_report: rebuild the stage when its inputs have changed, and say so. Without it, changed inputs are an error,
            which protects models. A report's `work` finds the files of the earlier report.

    Raises:
        UserError: the directory is complete or unfinished with other inputs, or not writable.
    """
    directory = stage_dir(config, stage.name)
    values = chosen(config, settings)
    inputs = {"settings": values, "parents": dict(parents), "data": data}
    begun = {**inputs, "settings": values if resumable_as is None else resumable_as(values)}
    if (directory / ARTIFACT_FILE).is_file() and not config.overwrite:
        done = load(directory)
        if _is_up_to_date(done, inputs, is_report):
            return done
    _raise_if_foreign(directory)
    if not is_report and not config.overwrite:
        _raise_if_unfinished_differs(directory, begun)
    # Tracking starts before anything is deleted: an unreachable tracking service must not cost an earlier result.
    with _alone_in(config, directory), followed(config, stage.name, directory.parent):
        wait_for_everyone()
        if is_main_process():
            _prepare(config, directory, begun, keep_files=is_report and not config.overwrite)
        wait_for_everyone()
        started = time.monotonic()
        result = work(directory) if on_every_process or is_main_process() else None
        wait_for_everyone()
        if is_main_process():
            assert result is not None
            seconds = time.monotonic() - started
            _publish(config, stage, directory=directory, inputs=inputs, result=result, seconds=seconds)
        wait_for_everyone()
    return load(directory)


def load(directory: Path, check_files: bool = True) -> Artifact:
    """Read a complete stage's artifact.json, and check that all of its files are there with their recorded sizes.

    Raises:
        UserError: no artifact.json, an unreadable one, or a missing or changed file.
    """
    path = directory / ARTIFACT_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"holds {type(record).__name__}, not an object")
        known = {item.name for item in dataclasses.fields(Artifact)} - {"directory", "kind"}
        artifact = Artifact(directory, kind=Kind[record["kind"]], **{name: record[name] for name in known})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: not a readable artifact ({error}). Run its stage again with overwrite=true."
        ) from error
    for name, size in artifact.files.items() if check_files else ():
        file = directory / name
        if not file.is_file() or file.stat().st_size != size:
            state = "changed in size since it was written" if file.is_file() else "missing"
            raise UserError(f"{file}: {state}. Run stage={artifact.stage} again with overwrite=true.")
    return artifact


def require(config: PipelineConfig, stage: Stage, check_files: bool = True) -> Artifact:
    """The complete artifact of another stage of this run.

    Raises:
        UserError: it is missing, unfinished or stale. The message says which stage to run.
    """
    directory = stage_dir(config, stage.name)
    if not (directory / ARTIFACT_FILE).is_file():
        state = "unfinished" if directory.is_dir() else "missing"
        first = stage_command(stage, run_dir=config.base_run or config.run_dir, recipe=config.recipe)
        if config.base_run is not None:
            first += ", or this command with that stage"
        raise UserError(f"stage={config.stage.name} needs {directory}, which is {state}. Run first: {first}")
    artifact = load(directory, check_files)
    stale = staleness(config, artifact)
    if stale is not None:
        raise UserError(stale)
    return artifact


def staleness(config: PipelineConfig, artifact: Artifact) -> str | None:
    """Why a model of this run is stale: a stage that it was made from has been rebuilt. None if it is not stale.

    A parent whose directory was removed to save space is not checked. Reports bring themselves up to date.
    """
    if artifact.kind is Kind.report:
        return None
    for name, fingerprint in artifact.parents.items():
        directory = stage_dir(config, name)
        if name in Stage.__members__ and (directory / ARTIFACT_FILE).is_file():
            parent = load(directory, check_files=False)
            if parent.fingerprint != fingerprint:
                return (
                    f"{artifact.directory} was made from an earlier {name}, which was rebuilt since."
                    f" Run stage={artifact.stage} again with overwrite=true."
                )
            if (inherited := staleness(config, parent)) is not None:
                return inherited
    return None


def report_parents(config: PipelineConfig, stage: Stage) -> dict[str, str]:
    """The parents of the complete or unfinished report of a stage; empty without one.

    Raises:
        UserError: as `load`.
    """
    directory = stage_dir(config, stage.name)
    if is_complete(config, stage):
        return load(directory).parents
    return (_unfinished(directory) or {"parents": {}})["parents"]


def is_complete(config: PipelineConfig, stage: Stage) -> bool:
    """Whether a stage of this run is complete."""
    return (stage_dir(config, stage.name) / ARTIFACT_FILE).is_file()


def stage_dir(config: PipelineConfig, name: str) -> Path:
    """The directory of a stage: that of `base_run` if this run can use it unchanged, else this run's own.

    Directories that belong to no stage (tables of data, a synthetic source) are kept in `base_run` alone.
    """
    own = _run_dir(config.run_dir) / name
    if config.base_run is None or (own / ARTIFACT_FILE).is_file() or (own / UNFINISHED_FILE).is_file():
        return own
    shared = _run_dir(config.base_run) / name
    return shared if name not in Stage.__members__ or _serves(config, shared) else own


def needed(config: PipelineConfig) -> list[Stage]:
    """Stages to run before `config.stage`: the earlier stages that `base_run` has, if only with other settings.

    Where the settings differ, this run makes the stage itself. A stage that `base_run` lacks is not in the list, and
    `require` asks the user for it: otherwise every job of a sweep would train it.
    """
    if config.base_run is None or config.stage not in MODEL_STAGES:
        return []
    earlier = MODEL_STAGES[: MODEL_STAGES.index(config.stage)]
    skips_sft = config.quantize.source is QuantizeSource.upcast
    there = [stage for stage in earlier if (_run_dir(config.base_run) / stage.name / ARTIFACT_FILE).is_file()]
    return [stage for stage in there if not (skips_sft and stage is Stage.sft)]


def _run_dir(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _serves(config: PipelineConfig, directory: Path) -> bool:
    """Whether a stage of `base_run` has the settings of this run, and so have the stages that it was made from.

    A stage that overwrite=true rebuilds is this run's own, because other runs use that of `base_run`.
    """
    name = directory.name
    is_rebuilt = config.overwrite and config.stage.name == name
    if Stage[name] not in MODEL_STAGES or is_rebuilt or not (directory / ARTIFACT_FILE).is_file():
        return False
    artifact = load(directory, check_files=False)
    parents = [parent for parent in artifact.parents if parent in Stage.__members__]
    has_same_parents = all(stage_dir(config, parent) == directory.with_name(parent) for parent in parents)
    return has_same_parents and artifact.settings == chosen(config, tuple(artifact.settings))


def fingerprint_of(directory: Path, known: dict[str, str] | None = None) -> tuple[str, dict[str, int]]:
    """XXH3-128 of the payload's names, sizes and digests, and the size in bytes of each file of the payload.

    Args:
        directory: of a stage, or any other.
        known: file -> XXH3-128 of its bytes, for files that need not be read again.
    """
    digests = dict(known or {})
    payload = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    sizes = {name: payload[name].stat().st_size for name in sorted(payload) if _is_payload(name)}
    unread = {name: size for name, size in sizes.items() if name not in digests}
    with progress(total=sum(unread.values()), what="fingerprint", unit="B") as bar:
        for name in unread:
            digests[name] = _digest(payload[name], bar.update)
    text = "".join(f"{name}\0{size}\0{digests[name]}\0" for name, size in sizes.items())
    return xxhash.xxh3_128_hexdigest(text.encode()), sizes


def _digest(path: Path, advance: Callable[[int], object]) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _is_payload(name: str) -> bool:
    return name.removesuffix(".tmp") not in BOOKKEEPING and not name.startswith(f"{CHECKPOINTS_DIR}/")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_up_to_date(done: Artifact, inputs: dict[str, Any], is_report: bool) -> bool:
    """Whether there is nothing to do.

    Raises:
        UserError: a model was made with other inputs. A report is then rebuilt instead.
    """
    before = _inputs_of(done)
    if not is_report:
        _raise_if_changed(done.directory, before, inputs, "is complete, but was made with other inputs")
    if before != inputs:
        say(done.stage, f"made anew, since {'; '.join(_differences(before, inputs))}")
        return False
    say(done.stage, f"up to date: {done.directory}")
    _clear_work(done.directory)
    return True


@contextmanager
def _alone_in(config: PipelineConfig, directory: Path) -> Iterator[None]:
    """Lock a stage's directory: two runs that write to it would mix their files, and the result would look complete."""
    if not is_main_process():
        yield
        return
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = (directory.parent / f".{directory.name}.lock").open("w")
    except OSError as error:
        raise not_writable(config, directory, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{directory}: another run is working there. Wait for it, or set another run_dir."
            ) from error
        yield


def _prepare(config: PipelineConfig, directory: Path, begun: dict[str, Any], keep_files: bool) -> None:
    """Make the directory ready for work: with the files of an interrupted run, or of an earlier report, or empty.

    unfinished.json is written before anything is deleted. An interruption can therefore not leave a directory that
    this program does not recognize.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        is_resumed = _unfinished(directory) == begun and not (directory / ARTIFACT_FILE).exists()
        write_json(directory / UNFINISHED_FILE, begun)
        (directory / ARTIFACT_FILE).unlink(missing_ok=True)
        if is_resumed:
            say(directory.name, f"resuming what was interrupted in {directory}")
        elif keep_files:
            (directory / METRICS_FILE).unlink(missing_ok=True)
        else:
            _empty(directory)  # any earlier result has other inputs, and the user has set overwrite=true
        OmegaConf.save(OmegaConf.structured(config), directory / CONFIG_FILE)
    except OSError as error:
        raise not_writable(config, directory, error) from error


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != UNFINISHED_FILE:
            path.unlink()


def not_writable(config: PipelineConfig, directory: Path, error: OSError) -> UserError:
    """The error for a directory of the run that cannot be created or written."""
    return UserError(
        f"run_dir={config.run_dir}: cannot write {directory} ({error.strerror}). Set run_dir to a writable place."
    )


def _publish(
    config: PipelineConfig, stage: Stage, *, directory: Path, inputs: dict[str, Any], result: Result, seconds: float
) -> None:
    fingerprint, files = fingerprint_of(directory, result.digests)
    record = {
        "stage": stage.name,
        "kind": result.kind.name,
        "format": result.format,
        "fake_quantized": result.fake_quantized,
        "scale_rule": result.scale_rule,
        "fingerprint": fingerprint,
        **inputs,
        "base_model": {"path": config.model.path, "revision": config.model.revision},
        "details": result.details,
        "files": files,
        "seconds": round(seconds, 3),
        **provenance.record(),
    }
    write_json(directory / ARTIFACT_FILE, record)
    _clear_work(directory)
    say(stage.name, f"done in {seconds:.1f} s: {directory}")


def _clear_work(directory: Path) -> None:
    """Remove the files that only an unfinished stage needs. Call it when artifact.json is written, not before."""
    if is_main_process():
        shutil.rmtree(directory / CHECKPOINTS_DIR, ignore_errors=True)
        (directory / UNFINISHED_FILE).unlink(missing_ok=True)
        (directory / SHARDS_FILE).unlink(missing_ok=True)


def chosen(config: PipelineConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """The settings under `keys`, flat: dotted key -> plain value."""
    sections = {key.partition(".")[0] for key in keys}  # OmegaConf is slow to convert the whole configuration
    node = OmegaConf.create({name: value for name, value in vars(config).items() if name in sections})
    flat: dict[str, Any] = {}
    for key in keys:
        value = OmegaConf.select(node, key)
        if OmegaConf.is_config(value):
            plain = OmegaConf.to_container(value, enum_to_str=True)
            flat.update(_flatten(plain, f"{key}.") if isinstance(plain, dict) else {key: plain})
        else:
            flat[key] = value.name if isinstance(value, Enum) else value
    return flat


def _flatten(node: Any, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def _inputs_of(artifact: Artifact) -> dict[str, Any]:
    return {"settings": artifact.settings, "parents": artifact.parents, "data": artifact.data}


def _unfinished(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / UNFINISHED_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _raise_if_foreign(directory: Path) -> None:
    ours = (directory / ARTIFACT_FILE).is_file() or (directory / UNFINISHED_FILE).is_file()
    if not ours and directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{directory}: holds files that this program did not write. Move them away, or set another run_dir."
        )


def _raise_if_unfinished_differs(directory: Path, begun: dict[str, Any]) -> None:
    """Protect unfinished work like a complete stage. A directory without payload is not protected."""
    before = _unfinished(directory)
    made = [path for path in directory.rglob("*") if path.is_file() and path.name not in BOOKKEEPING]
    if before is not None and made:
        what = "is unfinished, and was begun with other inputs"
        _raise_if_changed(directory, before, begun, what, "Go on with the same inputs, or use")


def _raise_if_changed(
    directory: Path, before: dict[str, Any], now: dict[str, Any], what: str, remedy: str = "Use"
) -> None:
    differences = _differences(before, now)
    if differences:
        raise UserError(
            f"{directory} {what}: {'; '.join(differences)}."
            f" {remedy} overwrite=true to rebuild it, or another run_dir to keep it."
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = [
        f"{key}: was {old!r}, is {new!r}"
        for part in ("settings", "parents")
        for key in sorted({*before[part], *now[part]})
        if (old := before[part].get(key)) != (new := now[part].get(key))
    ]
    if before["data"] != now["data"]:
        found.append(f"the data set's contents: fingerprint was {before['data']}, is {now['data']}")
    return found
