"""Log metrics and tables of a stage to its directory, and also to the tracker that the user chose.

Only the main process writes and sends.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.config import TrackingBackend, Upload
from pipeline.errors import UserError
from pipeline.runs import parts
from pipeline.runs.artifacts import Artifact, Kind
from pipeline.runs.console import say, warn
from pipeline.runs.durable import write_text
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run
from pipeline.runs.settings import plain
from pipeline.runs.trackers import lineage, weights_and_biases
from pipeline.runs.trackers.mlflow import MLflow
from pipeline.runs.trackers.readings import read_line
from pipeline.runs.trackers.tensorboard import TensorBoard
from pipeline.runs.trackers.tracker import Hint, TrackedStage, Tracker, in_one_line
from pipeline.runs.trackers.weights_and_biases import WeightsAndBiases

RUN_FILE = "tracking.json"
"""File in the run's directory. It holds the group of this pipeline run in the tracker, and the prefix of its ids."""


@dataclass(frozen=True)
class _Backend:
    """A tracker that can be chosen.

    Attributes:
        start: begins to track a stage.
        modules: modules that must be importable. The extra with the tracker's name installs them.
        environment: environment variables for the directory of a run, unless the user has set them.
        check_login: raises UserError if the service needs a login and there is none.
    """

    start: Callable[[TrackedStage], Tracker]
    modules: tuple[str, ...]
    environment: Callable[[Path], dict[str, str]] = lambda _: {}
    check_login: Callable[[], None] = lambda: None


_BACKENDS = {
    TrackingBackend.wandb: _Backend(
        WeightsAndBiases, ("wandb",), weights_and_biases.environment, weights_and_biases.check_login
    ),
    TrackingBackend.tensorboard: _Backend(TensorBoard, ("tensorboard",)),
    TrackingBackend.mlflow: _Backend(MLflow, ("mlflow", "sqlalchemy", "alembic")),
}


@dataclass
class _Current:
    """The stage that is tracked.

    Attributes:
        stage: its name.
        tracker: the tracker, or None after its first failure.
        upload: what the tracker gets.
        report: finished files of the stage, keyed by their names. The report has them.
    """

    stage: str
    tracker: Tracker | None
    upload: Upload
    report: dict[str, Path]


_current: _Current | None = None
_hints: list[Hint] | None = None  # hints to print when the program ends, or None if each stage prints its own


def log_metrics(directory: Path, values: Mapping[str, object], model: str | None = None) -> None:
    """Append one JSON object to the stage's metrics.jsonl, and send it to the tracker.

    Args:
        directory: directory of the stage.
        values: the object. `model`, if present, names the model that the figures belong to.
        model: name of the model in the tracker, if `values` has a name that is not unique.
    """
    if is_main_process():
        line = {"time": round(time.time(), 3), **values}
        with (directory / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if _current is not None:
            reading = read_line(line, _current.stage, model)
            _send(lambda tracker: tracker.log(reading))


def log_table(directory: Path, name: str, columns: list[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to <directory>/<name>.jsonl, one object per row, and send it to the tracker.

    Args:
        directory: directory of the stage.
        name: name of the table.
        columns: names of the columns.
        rows: one tuple per row. JSON must be able to represent the values.
    """
    if is_main_process():
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        write_text(directory / f"{name}.jsonl", "".join(lines))
        if _uploads(Upload.report):
            _send(lambda tracker: tracker.log_table(name, columns, rows))


def log_report(files: list[Path]) -> None:
    """Add finished files to the stage's report. The tracker gets them when the stage is complete."""
    if _current is not None:
        _current.report |= {file.name: file for file in files}


def log_media(images: dict[str, Path], pages: dict[str, Path]) -> None:
    """Send finished plots and HTML pages of the stage to the tracker, each under its name."""
    if _uploads(Upload.report):
        _send(lambda tracker: tracker.log_media(images, pages))


def log_inputs(run: Run, parents: Mapping[str, str], data: str | None) -> None:
    """Tell the tracker which data set and which models the stage uses. The arguments are those of `lineage.inputs`."""
    if _current is not None:
        items = list(lineage.inputs(run, parents, data))

        def use(tracker: Tracker) -> None:
            for item in items:
                tracker.use(item)

        _send(use)


def log_output(artifact: Artifact) -> None:
    """Tell the tracker what the complete stage made, and its final figures."""
    if _current is None:
        return
    item = lineage.describe(artifact, _current.report if _uploads(Upload.report) else None)
    _send(lambda tracker: tracker.make(item))
    if _uploads(Upload.models) and artifact.kind is not Kind.report:
        weights = lineage.weights(artifact)
        _send(lambda tracker: tracker.make(weights))
    figures = lineage.final_figures(artifact)
    _send(lambda tracker: tracker.summarize(figures))


def raise_if_not_installed(backend: TrackingBackend) -> None:
    """Raise UserError if a package of the tracker is missing. The message has the command that installs it."""
    modules = _BACKENDS[backend].modules if backend in _BACKENDS else ()
    if missing := [name for name in modules if find_spec(name) is None]:
        raise UserError(
            f"tracking={backend.name}: the package {missing[0]} is not installed."
            f" Use pip install 'gpt-oss-qat[{backend.name}]', or tracking=none."
        )


def raise_if_impossible(backend: TrackingBackend) -> None:
    """Check the packages and the login of the tracker before work begins. No service is contacted.

    Raises:
        UserError: a package is missing, or there is no login.
    """
    raise_if_not_installed(backend)
    if backend in _BACKENDS and is_main_process():
        _BACKENDS[backend].check_login()


@contextmanager
def track(run: Run, stage: str, run_dir: Path) -> Iterator[None]:
    """Inside the block, the tracker (`tracking.backend`) receives everything that the stage logs.

    Args:
        run: the run whose configuration is sent, without secrets.
        stage: name of the stage. Each stage, or part of a stage, is one run of the tracker. All stages of a pipeline
            run form one group.
        run_dir: directory of the pipeline run. The tracker's local files go below it.

    Raises:
        UserError: a package is missing, or the tracker cannot start. Later failures are warnings: the stage goes on
            without the tracker.
    """
    global _current
    settings = run.config.tracking
    if settings.backend is TrackingBackend.none or not is_main_process():
        yield
        return
    raise_if_not_installed(settings.backend)
    backend = _BACKENDS[settings.backend]
    with _environment(backend.environment(run_dir)):
        tracker = backend.start(_describe(run, stage, run_dir))
        if tracker.url is not None:
            say(stage, f"{tracker.title}: {tracker.url}")
        _current = _Current(stage, tracker, settings.upload, {})
        succeeded = False
        try:
            yield
            succeeded = True
        finally:
            _send(lambda tracker: tracker.finish(succeeded))
            _current = None
            _tell(stage, tracker.hint)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the environment variables that the user has not set."""
    chosen = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]


@contextmanager
def one_hint(stage: str) -> Iterator[None]:
    """Print the commands that show or upload the tracked stages once, after the block."""
    global _hints
    _hints = []
    try:
        yield
    finally:
        found, _hints = _hints, None
        places: dict[tuple[str, str], list[str]] = {}
        for hint in found:
            known = places.setdefault((hint.purpose, hint.command), [])
            known += [hint.place] if hint.place and hint.place not in known else []
        for (purpose, command), where in places.items():
            say(stage, f"{purpose}: {' '.join([command, *where])}")


def _tell(stage: str, hint: Hint | None) -> None:
    if hint is None:
        return
    if _hints is not None:
        _hints.append(hint)
    else:
        say(stage, f"{hint.purpose}: {hint.command} {hint.place}".rstrip())


def _uploads(wanted: Upload) -> bool:
    order = list(Upload)
    return _current is not None and order.index(_current.upload) >= order.index(wanted)


def _send(act: Callable[[Tracker], None]) -> None:
    """Let the tracker act. Its first failure is a warning and ends tracking of this stage."""
    if _current is None or _current.tracker is None:
        return
    tracker = _current.tracker
    try:
        act(tracker)
    except tracker.failures as error:
        _current.tracker = None
        told = f"{tracker.title} failed ({in_one_line(error)}): going on without it. {METRICS_FILE} has everything."
        warn(_current.stage, f"{told} {tracker.rescue}".rstrip())


def _describe(run: Run, stage: str, run_dir: Path) -> TrackedStage:
    config = run.config
    identity = _identity(run, run_dir)
    part = run.part if stage in parts.STAGES else None
    return TrackedStage(
        stage=stage,
        part=part,
        name=_name_of(run),
        group=identity["group"],
        id="-".join([identity["id"], stage, *([] if part is None else [part])]),
        labels={
            "recipe": run.recipe,
            "model": lineage.base_name(config.model.path),
            "format": config.format.name.name,
        },
        config=plain(config),
        directory=run_dir,
        settings=config.tracking,
    )


def _identity(run: Run, run_dir: Path) -> dict[str, str]:
    """Read or create <run_dir>/tracking.json.

    `id` is the prefix of every stage's id in the tracker. `group` is the group of the pipeline run.
    """
    path = run_dir / RUN_FILE
    if not path.is_file():
        made = uuid.uuid4().hex[:8]
        identity = {"id": made, "group": f"{_name_of(run)}-{made}"}
        path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {"id": kept["id"], "group": kept["group"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error!r}). Remove it to begin a new group of tracked runs.") from error


def _name_of(run: Run) -> str:
    return run.config.tracking.name or run.recipe
