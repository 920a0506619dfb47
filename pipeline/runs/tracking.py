"""Log metrics and tables of a stage to its directory, and also to Weights & Biases if the user wants that.

Only the main process writes and sends. This is the only module that imports wandb.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from pipeline.config import TrackingBackend
from pipeline.errors import UserError
from pipeline.runs.console import say, warn
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import is_main_process
from pipeline.runs.run import Run

if TYPE_CHECKING:
    import wandb

RUN_FILE = "tracking.json"
"""File in the run's directory. It holds the W&B group of this pipeline run, and the prefix of its W&B run ids."""

_WANDB_DIR = "wandb"
_UPLOAD_SECONDS = 120.0  # limit for uploads at the end of a stage; `wandb sync` uploads the rest


def log_metrics(directory: Path, values: Mapping[str, object]) -> None:
    """Append one JSON object to the stage's metrics.jsonl, and send it to the tracking service."""
    if is_main_process():
        line = {"time": round(time.time(), 3), **values}
        with (directory / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if _tracker is not None:
            _tracker.send_metrics(line)


def log_table(directory: Path, name: str, columns: list[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table to <directory>/<name>.jsonl, one object per row, and send it to the service.

    Args:
        directory: directory of the stage.
        name: name of the table.
        columns: names of the columns.
        rows: one tuple per row. JSON must be able to represent the values.
    """
    if is_main_process():
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        if _tracker is not None:
            _tracker.send_table(name, columns, rows)


def log_report(name: str, files: list[Path]) -> None:
    """Send finished files of the stage to the service, as one artifact with versions."""
    if _tracker is not None:
        _tracker.send_report(name, files)


def log_media(images: dict[str, Path], pages: dict[str, Path]) -> None:
    """Send finished plots and HTML pages of the stage to the service, each under its name."""
    if _tracker is not None:
        _tracker.send_media(images, pages)


@contextmanager
def track(run: Run, stage: str, run_dir: Path) -> Iterator[None]:
    """Inside the block, a service (`tracking.backend`) receives everything that the stage logs.

    Args:
        run: the run whose configuration is sent. It holds no secrets.
        stage: name of the stage. Each stage is one W&B run. All stages of a pipeline run form one W&B group.
        run_dir: directory of the pipeline run. The service's files go to <run_dir>/wandb.

    Raises:
        UserError: the service's package is missing, there is no login, or the service cannot be reached. Later failures
            are warnings: training goes on without the service.
    """
    global _tracker
    if run.config.tracking.backend is TrackingBackend.none or not is_main_process():
        yield
        return
    with _keep_wandb_files_in(run_dir / _WANDB_DIR):
        _tracker = _Wandb(run, stage, run_dir)
        exit_status = 1
        try:
            yield
            exit_status = 0
        finally:
            _tracker.finish(exit_status)
            _tracker = None


class _Wandb:
    """One stage's run at Weights & Biases. The first failure after the start gives a warning and ends tracking."""

    def __init__(self, run: Run, stage: str, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracking=wandb: the package wandb is not installed. Use pip install 'gpt-oss-qat[wandb]', or"
                " tracking=none."
            ) from error
        self._library = wandb
        self._stage = stage
        self._has_steps = False
        identity = _identity(run, run_dir)
        try:
            started = self._start(run, identity, run_dir)
        # wandb raises ValueError if a setting is invalid, and OSError if its process or its files fail.
        except (wandb.errors.Error, ValueError, OSError) as error:
            raise _not_started(str(error)) from error
        self._run: wandb.Run | None = started
        self._files = Path(started.dir).parent
        say(stage, f"W&B: {self._place(started)}")

    def _start(self, run: Run, identity: dict[str, str], run_dir: Path) -> "wandb.Run":
        quiet = self._library.Settings(silent=True)  # wandb prints nothing; its errors are raised
        is_online = self._library.setup(quiet).settings.mode in ("online", "run", "shared")
        # Check the login here, because `init` would ask for it at the terminal and wait.
        if is_online and not self._library.login(prompt=False, verify=False):
            raise self._library.errors.UsageError("no login")
        settings: Any = OmegaConf.to_container(OmegaConf.structured(run.config), enum_to_str=True)
        tracking = run.config.tracking
        return self._library.init(
            project=tracking.project,
            entity=tracking.entity,
            tags=tracking.tags,
            group=identity["group"],
            name=f"{_name_of(run)}-{self._stage}",
            id=f"{identity['id']}-{self._stage}",
            job_type=self._stage,
            resume="allow",
            config=settings,
            dir=run_dir,
            settings=self._library.Settings(
                console="off",
                disable_code=True,
                disable_git=True,  # the commit is in artifact.json, and wandb would add the text of all changes
                allow_val_change=True,
                finish_timeout=_UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def _place(self, run: "wandb.Run") -> str:
        if run.disabled:
            return "disabled, by WANDB_MODE or `wandb disabled`"
        return f"offline; to upload: wandb sync {self._files}" if run.offline else str(run.url)

    def send_metrics(self, values: Mapping[str, object]) -> None:
        def send(run: "wandb.Run") -> None:
            if "step" in values and not self._has_steps:
                # wandb's own step counter cannot go back, but a resumed stage repeats steps.
                run.define_metric("*", step_metric="step")
                self._has_steps = True
            run.log(dict(values))

        self._try(send)

    def send_table(self, name: str, columns: list[str], rows: Sequence[Sequence[object]]) -> None:
        self._try(lambda run: run.log({name: self._library.Table(columns=columns, data=rows, allow_mixed_types=True)}))

    def send_media(self, images: dict[str, Path], pages: dict[str, Path]) -> None:
        def send(run: "wandb.Run") -> None:
            shown = {f"plots/{name}": self._library.Image(str(path)) for name, path in images.items()}
            shown |= {f"pages/{name}": self._library.Html(str(path), inject=False) for name, path in pages.items()}
            run.log(shown)

        self._try(send)

    def send_report(self, name: str, files: list[Path]) -> None:
        def send(run: "wandb.Run") -> None:
            report = self._library.Artifact(f"{run.group}-{name}", type="report")
            for file in files:
                report.add_file(str(file))
            run.log_artifact(report)

        self._try(send)

    def finish(self, exit_status: int) -> None:
        """End the W&B run after its last uploads. The service shows it as failed unless `exit_status` is 0."""
        self._try(lambda run: run.finish(exit_code=exit_status))

    def _try(self, send: Callable[["wandb.Run"], None]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except (self._library.errors.Error, OSError) as error:
            warn(
                self._stage,
                f"W&B does not answer ({_in_one_line(error)}): going on without it. {METRICS_FILE} has everything."
                f" To upload what W&B has on disk: wandb sync {self._files}",
            )
            self._run = None


_tracker: _Wandb | None = None


def _not_started(reason: str) -> UserError:
    return UserError(
        f"tracking=wandb: W&B could not be started ({_in_one_line(reason)}). Log in with `wandb login`,"
        " set WANDB_MODE=offline to upload later, or use tracking=none."
    )


def _in_one_line(error: object) -> str:
    """Join the first lines of a message. They name the fault and its place; the rest explains the use of wandb."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__


def _identity(run: Run, run_dir: Path) -> dict[str, str]:
    """Read or create <run_dir>/tracking.json.

    `id` is the prefix of every stage's W&B run id. `group` is the W&B group of the pipeline run.
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
        raise UserError(f"{path}: not readable ({error!r}). Remove it to begin a new group of W&B runs.") from error


def _name_of(run: Run) -> str:
    return run.config.tracking.name or run.recipe


@contextmanager
def _keep_wandb_files_in(directory: Path) -> Iterator[None]:
    """Put wandb's staged artifacts and logs into this directory too, unless the user has set another place for them."""
    chosen = {name: str(directory) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]
