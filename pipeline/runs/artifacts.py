"""What a stage leaves behind: one directory, complete exactly when its artifact.json is there.

`build` is the life of a stage's directory: up to date, changed, unfinished, or new; the stage's work; then
artifact.json, last and atomically. Fingerprints are of contents, so a stage rebuilt with the same result leaves what
depends on it up to date.
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

from pipeline.runs import provenance
from pipeline.config import PipelineConfig, QuantizeSource, Stage
from pipeline.errors import UserError
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.tracking import followed
from pipeline.runs.processes import is_main_process, process_count, wait_for_everyone
from pipeline.runs.console import progress, say

ARTIFACT_FILE = "artifact.json"
CONFIG_FILE = "config.yaml"
UNFINISHED_FILE = "unfinished.json"
SHARDS_FILE = "shards.json"
SAMPLES_FILE = "samples.jsonl"
CHECKPOINTS_DIR = "checkpoints"

BOOKKEEPING = {ARTIFACT_FILE, CONFIG_FILE, METRICS_FILE, SAMPLES_FILE, UNFINISHED_FILE, SHARDS_FILE}
_SHARED = (Stage.upcast, Stage.sft, Stage.quantize, Stage.qat)
"""Stages whose models runs can share, in order; what reports on a run is its own."""
_READ_BYTES = 1 << 24


class Kind(Enum):
    """What a directory holds; `foreign` is a model in a layout that transformers does not load."""

    checkpoint = "checkpoint"
    adapter = "adapter"
    packed = "packed"
    foreign = "foreign"
    report = "report"


@dataclass(frozen=True)
class Result:
    """What a stage's work says about what it made.

    Attributes:
        kind: of the payload.
        format: number format of the experts' weights in the payload, or None for a report.
        fake_quantized: the FORMATS row that the model's forward pass rounds the experts' weights to, or None.
        scale_rule: how `fake_quantized`, or a packed `format`, chooses its scales, or None.
        details: figures worth keeping: counts, losses, sizes.
        digests: file -> XXH3-128 of its bytes, for those that `work` hashed while it wrote them.
    """

    kind: Kind
    format: str | None = None
    fake_quantized: str | None = None
    scale_rule: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A complete stage: where it lies and what artifact.json says."""

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
    settings: tuple[str, ...],
    parents: dict[str, str],
    work: Callable[[Path], Result],
    data: str | None = None,
    on_every_process: bool = False,
    is_report: bool = False,
) -> Artifact:
    """Run `work` unless its result is there already, and publish what it leaves in the stage's directory.

    Args:
        config: the resolved configuration.
        stage: whose directory it is.
        settings: dotted keys (or sections) of the configuration that the result depends on.
        parents: name -> fingerprint of everything the result is made from.
        work: fills the directory that it is given; finds there what an interrupted run of the same settings left.
        data: fingerprint of the data set, where one is used.
        on_every_process: whether `work` is a joint effort of all processes (training), or the main process' alone.
        is_report: a report costs little and must tell of what is there now: when its inputs changed it is made anew,
            saying so, where a model would be protected by an error. `work` finds the earlier report's files.

    Raises:
        UserError: the directory is complete or unfinished with other settings or parents, or not writable.
    """
    directory = stage_dir(config, stage.name)
    inputs = {"settings": chosen(config, settings), "parents": dict(parents), "data": data}
    if (directory / ARTIFACT_FILE).is_file() and not config.overwrite:
        done = load(directory)
        if _is_up_to_date(done, inputs, is_report):
            return done
    _raise_if_foreign(directory)
    if not is_report and not config.overwrite:
        _raise_if_unfinished_differs(directory, inputs)
    # Followed before anything is emptied: a service that cannot be reached must not cost an earlier result.
    with _alone_in(config, directory), followed(config, stage.name, directory.parent):
        wait_for_everyone()
        if is_main_process():
            _prepare(config, directory, inputs, keep_files=is_report and not config.overwrite)
        wait_for_everyone()
        started = time.monotonic()
        result = work(directory) if on_every_process or is_main_process() else None
        wait_for_everyone()
        if is_main_process():
            assert result is not None
            _publish(config, stage, directory, inputs, result, time.monotonic() - started)
        wait_for_everyone()
    return load(directory)


def load(directory: Path, check_files: bool = True) -> Artifact:
    """Read a complete stage's artifact.json and check that its files are all there, in their sizes.

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
        UserError: it is missing or unfinished; says which stage to run.
    """
    directory = stage_dir(config, stage.name)
    if not (directory / ARTIFACT_FILE).is_file():
        state = "unfinished" if directory.is_dir() else "missing"
        recipe = "" if config.recipe == PipelineConfig.recipe else f" recipe={config.recipe}"
        first = f"python -m pipeline stage={stage.name}{recipe} run_dir={config.base_run or config.run_dir}"
        if config.base_run is not None:
            first += ", or this command with that stage"
        raise UserError(f"stage={config.stage.name} needs {directory}, which is {state}. Run first: {first}")
    artifact = load(directory, check_files)
    stale = staleness(config, artifact)
    if stale is not None:
        raise UserError(stale)
    return artifact


def staleness(config: PipelineConfig, artifact: Artifact) -> str | None:
    """Why a model of this run does not belong to the stages it was made from any more, or None.

    A parent whose directory was removed to save space is not looked at; reports bring themselves up to date.
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
    """What a report was last made from, or was being made from when it was interrupted; empty without one.

    Raises:
        UserError: as `load`.
    """
    directory = stage_dir(config, stage.name)
    if is_complete(config, stage):
        return load(directory).parents
    return (_unfinished(directory) or {"parents": {}})["parents"]


def is_complete(config: PipelineConfig, stage: Stage) -> bool:
    """Whether a stage of this run has been published."""
    return (stage_dir(config, stage.name) / ARTIFACT_FILE).is_file()


def stage_dir(config: PipelineConfig, name: str) -> Path:
    """Where a stage of this run has its files, or `base_run` has them, if they serve as they are.

    What belongs to no stage (tables of data, a synthetic source) is kept in `base_run` alone.
    """
    own = _run_dir(config.run_dir) / name
    if config.base_run is None or (own / ARTIFACT_FILE).is_file() or (own / UNFINISHED_FILE).is_file():
        return own
    shared = _run_dir(config.base_run) / name
    return shared if name not in Stage.__members__ or _serves(config, shared) else own


def needed(config: PipelineConfig) -> list[Stage]:
    """Stages that come before the one asked for, where `base_run` has them, be it with other settings.

    With those this run makes its own. What `base_run` has not is asked for, so that not every job of a sweep trains it.
    """
    if config.base_run is None or config.stage not in _SHARED:
        return []
    earlier = _SHARED[: _SHARED.index(config.stage)]
    skips_sft = config.quantize.source is QuantizeSource.upcast
    there = [stage for stage in earlier if (_run_dir(config.base_run) / stage.name / ARTIFACT_FILE).is_file()]
    return [stage for stage in there if not (skips_sft and stage is Stage.sft)]


def _run_dir(path: str) -> Path:
    return Path(path).expanduser().absolute()


def _serves(config: PipelineConfig, directory: Path) -> bool:
    """Whether a stage of `base_run` is what this run would make: of the same settings, from stages that are, too.

    A stage that is to be rebuilt is this run's own: other runs use the one of `base_run`.
    """
    name = directory.name
    is_rebuilt = config.overwrite and config.stage.name == name
    if Stage[name] not in _SHARED or is_rebuilt or not (directory / ARTIFACT_FILE).is_file():
        return False
    artifact = load(directory, check_files=False)
    parents = [parent for parent in artifact.parents if parent in Stage.__members__]
    has_same_parents = all(stage_dir(config, parent) == directory.with_name(parent) for parent in parents)
    return has_same_parents and artifact.settings == chosen(config, tuple(artifact.settings))


def fingerprint_of(directory: Path, known: dict[str, str] | None = None) -> tuple[str, dict[str, int]]:
    """XXH3-128 of the payload's names, sizes and digests, and the payload's files with their sizes in bytes.

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
    """Write a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _is_up_to_date(done: Artifact, inputs: dict[str, Any], is_report: bool) -> bool:
    """Whether there is nothing to do; a model that was made with other inputs is an error, a report is made anew."""
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
    """Let no second run write to a stage's directory: two would mix their files into one that looks complete."""
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


def _prepare(config: PipelineConfig, directory: Path, inputs: dict[str, Any], keep_files: bool) -> None:
    """Leave an empty directory, or the unfinished one of the same inputs, or (keep_files) a report's.

    unfinished.json is there before anything else goes, so that an interruption leaves no directory that is nobody's.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        begun = _begun_with(inputs)
        is_resumed = _unfinished(directory) == begun and not (directory / ARTIFACT_FILE).exists()
        write_json(directory / UNFINISHED_FILE, begun)
        (directory / ARTIFACT_FILE).unlink(missing_ok=True)
        if is_resumed:
            say(directory.name, f"resuming what was interrupted in {directory}")
        elif keep_files:
            (directory / METRICS_FILE).unlink(missing_ok=True)
        else:
            _empty(directory)  # complete or begun with other inputs: overwrite=true has let it come here
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
    """The error for a directory of the run that cannot be made or written."""
    return UserError(
        f"run_dir={config.run_dir}: cannot write {directory} ({error.strerror}). Set run_dir to a writable place."
    )


def _publish(
    config: PipelineConfig, stage: Stage, directory: Path, inputs: dict[str, Any], result: Result, seconds: float
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
    """Remove what a complete stage needs no more. Only now: before, an interruption would have cost it."""
    if is_main_process():
        shutil.rmtree(directory / CHECKPOINTS_DIR, ignore_errors=True)
        (directory / UNFINISHED_FILE).unlink(missing_ok=True)
        (directory / SHARDS_FILE).unlink(missing_ok=True)


def chosen(config: PipelineConfig, keys: tuple[str, ...]) -> dict[str, Any]:
    """The settings under `keys`, flat: dotted key -> plain value."""
    sections = {key.partition(".")[0] for key in keys}  # these alone: OmegaConf takes its time for the whole
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


def _begun_with(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs as far as a stage must be finished with those that it was begun with.

    In training the examples of an optimizer step matter, not how processes and forward passes share them.
    """
    settings = dict(inputs["settings"])
    for key in inputs["settings"]:
        section, _, name = key.rpartition(".")
        if name == "gradient_accumulation_steps":
            product = settings.pop(key) * settings.pop(f"{section}.batch_size") * process_count()
            settings[f"{section}.batch_size x {key} x processes"] = product
    return {**inputs, "settings": settings}


def _raise_if_foreign(directory: Path) -> None:
    ours = (directory / ARTIFACT_FILE).is_file() or (directory / UNFINISHED_FILE).is_file()
    if not ours and directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{directory}: holds files that this program did not leave. Move them away, or set another run_dir."
        )


def _raise_if_unfinished_differs(directory: Path, inputs: dict[str, Any]) -> None:
    """Unfinished work is protected as finished work is; a directory in which nothing was made yet is not work."""
    before = _unfinished(directory)
    made = [path for path in directory.rglob("*") if path.is_file() and path.name not in BOOKKEEPING]
    if before is not None and made:
        what = "is unfinished, and was begun with other inputs"
        _raise_if_changed(directory, before, _begun_with(inputs), what, "Go on with the same inputs, or use")


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
