"""What a run tells: lines for a person, progress, metrics.jsonl, and the same numbers for Weights & Biases.

Only the main process speaks, writes and sends. The only importer of wandb.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipeline.config import PipelineConfig, TrackingBackend
from pipeline.errors import UserError
from pipeline.runs.console import say, warn
from pipeline.runs.metrics import METRICS_FILE
from pipeline.runs.processes import is_main_process

RUN_FILE = "tracking.json"
"""In the run's directory: how the service knows this pipeline run."""

_WANDB_DIR = "wandb"
_UPLOAD_SECONDS = 120.0  # for what is left when a stage ends; `wandb sync` uploads what took longer


def log_metrics(directory: Path, values: dict[str, Any]) -> None:
    """Append one JSON object to the stage's metrics.jsonl, and send it to the service that follows the stage."""
    if is_main_process():
        line = {"time": round(time.time(), 3), **values}
        with (directory / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if _followed_by is not None:
            _followed_by.send_metrics(line)


def log_table(directory: Path, name: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Keep a table as <directory>/<name>.jsonl, one object per row, and send it to the service.

    Args:
        directory: of the stage.
        name: of the table.
        columns: names of the columns.
        rows: of values that JSON can hold.
    """
    if is_main_process():
        lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        if _followed_by is not None:
            _followed_by.send_table(name, columns, rows)


def log_report(name: str, files: list[Path]) -> None:
    """Send finished files of the stage to the service, as one artifact with versions."""
    if _followed_by is not None:
        _followed_by.send_report(name, files)


def log_media(images: dict[str, Path], pages: dict[str, Path]) -> None:
    """Send finished plots and HTML pages of the stage to the service, each to be seen under its name."""
    if _followed_by is not None:
        _followed_by.send_media(images, pages)


@contextmanager
def followed(config: PipelineConfig, stage: str, run_dir: Path) -> Iterator[None]:
    """While it is open, what the stage logs also goes to the service that `tracking.backend` names.

    Args:
        config: the resolved configuration; all of it is sent, and it holds no secrets.
        stage: its name; each stage is a run of its own in the group of the pipeline run.
        run_dir: of the pipeline run; the service's files go to <run_dir>/wandb.

    Raises:
        UserError: the service's package is missing, there is no login, or the service cannot be reached. Later failures
            are warnings: training goes on without the service.
    """
    global _followed_by
    if config.tracking.backend is TrackingBackend.none or not is_main_process():
        yield
        return
    with _wandb_files_in(run_dir / _WANDB_DIR):
        _followed_by = _Wandb(config, stage, run_dir)
        exit_status = 1
        try:
            yield
            exit_status = 0
        finally:
            _followed_by.finish(exit_status)
            _followed_by = None


class _Wandb:
    """One stage's run at Weights & Biases; the first failure after the start is a warning and ends it."""

    def __init__(self, config: PipelineConfig, stage: str, run_dir: Path) -> None:
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
        identity = _identity(config, run_dir)
        try:
            self._run: Any = self._start(config, identity, run_dir)
        # ValueError: a setting that wandb refuses; OSError: its own process, or its files.
        except (wandb.errors.Error, ValueError, OSError) as error:
            raise _not_started(str(error)) from error
        say(stage, f"W&B: {self._place()}")

    def _start(self, config: PipelineConfig, identity: dict[str, str], run_dir: Path) -> Any:
        quiet = self._library.Settings(silent=True)  # what matters is said here; errors are raised
        is_online = self._library.setup(quiet).settings.mode in ("online", "run", "shared")
        # Asked for before the run is, since `init` would ask the person at the terminal, and wait.
        if is_online and not self._library.login(prompt=False, verify=False):
            raise self._library.errors.UsageError("no login")
        settings: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
        return self._library.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            tags=config.tracking.tags,
            group=identity["group"],
            name=f"{config.tracking.name or config.recipe}-{self._stage}",
            id=f"{identity['id']}-{self._stage}",
            job_type=self._stage,
            resume="allow",
            config=settings,
            dir=run_dir,
            settings=self._library.Settings(
                console="off",
                disable_code=True,
                disable_git=True,  # the commit is in artifact.json; wandb would add the text of all changes
                allow_val_change=True,
                finish_timeout=_UPLOAD_SECONDS,
                finish_timeout_raises=True,
            ),
        )

    def _place(self) -> str:
        if self._run.disabled:
            return "disabled, by WANDB_MODE or `wandb disabled`"
        return f"offline; to upload: wandb sync {self._files()}" if self._run.offline else self._run.url

    def _files(self) -> Path:
        return Path(self._run.dir).parent

    def send_metrics(self, values: dict[str, Any]) -> None:
        def send(run: Any) -> None:
            if "step" in values and not self._has_steps:
                # Not wandb's own counter, which refuses the steps that a resumed stage repeats.
                run.define_metric("*", step_metric="step")
                self._has_steps = True
            run.log(values)

        self._try(send)

    def send_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._try(lambda run: run.log({name: self._library.Table(columns=columns, data=rows, allow_mixed_types=True)}))

    def send_media(self, images: dict[str, Path], pages: dict[str, Path]) -> None:
        def send(run: Any) -> None:
            shown = {f"plots/{name}": self._library.Image(str(path)) for name, path in images.items()}
            shown |= {f"pages/{name}": self._library.Html(str(path), inject=False) for name, path in pages.items()}
            run.log(shown)

        self._try(send)

    def send_report(self, name: str, files: list[Path]) -> None:
        def send(run: Any) -> None:
            report = self._library.Artifact(f"{run.group}-{name}", type="report")
            for file in files:
                report.add_file(str(file))
            run.log_artifact(report)

        self._try(send)

    def finish(self, exit_status: int) -> None:
        """Upload what is left; the run is shown as failed unless `exit_status` is 0."""
        self._try(lambda run: run.finish(exit_code=exit_status))

    def _try(self, send: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except (self._library.errors.Error, OSError) as error:
            warn(
                self._stage,
                f"W&B does not answer ({_in_one_line(error)}): going on without. {METRICS_FILE} has everything;"
                f" what W&B got as far as the disk is uploaded by: wandb sync {self._files()}",
            )
            self._run = None


_followed_by: _Wandb | None = None


def _not_started(reason: str) -> UserError:
    return UserError(
        f"tracking=wandb: W&B could not be started ({_in_one_line(reason)}). Log in with `wandb login`,"
        " set WANDB_MODE=offline to upload later, or use tracking=none."
    )


def _in_one_line(error: object) -> str:
    """The first lines of a message, which tell what and where; the others tell how to call wandb."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__


def _identity(config: PipelineConfig, run_dir: Path) -> dict[str, str]:
    """`id`, with which the runs of all stages begin, and `group`: made once, kept in <run_dir>/tracking.json."""
    path = run_dir / RUN_FILE
    if not path.is_file():
        made = uuid.uuid4().hex[:8]
        identity = {"id": made, "group": f"{config.tracking.name or config.recipe}-{made}"}
        path.write_text(json.dumps(identity) + "\n", encoding="utf-8")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {"id": kept["id"], "group": kept["group"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error!r}). Remove it to begin a new group of W&B runs.") from error


@contextmanager
def _wandb_files_in(directory: Path) -> Iterator[None]:
    """Keep wandb's staged artifacts and logs there, too, unless the user has chosen a place for them."""
    chosen = {name: str(directory) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR") if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]
