"""MLflow: a database and files in <run_dir>/mlflow. This is the only module that imports mlflow.

MLflow keeps its own store of files only for old data (mlflow 3.17 refuses to create one), so the store is SQLite.
"""

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.runs import other_libraries
from pipeline.runs.trackers.readings import split
from pipeline.runs.trackers.tracker import DATASET, MODEL, Hint, Item, OnDisk, Reading, TrackedStage, in_one_line

if TYPE_CHECKING:
    from mlflow.entities import Experiment, LoggedModel, Run

_DIRECTORY = "mlflow"
_DATABASE = "mlflow.db"
_ID = "gpt_oss_qat.id"
_FINGERPRINT = "fingerprint"
_MOST_PARAMS = 100  # MLflow's limit for one call
_LONGEST_PARAM = 500
_NOT_IN_URI = "%?"


class MLflow(OnDisk):
    """A stage as one MLflow run, in the experiment of `tracking.project`.

    MLflow never changes a parameter. So a stage continues its run if its settings are the same, and otherwise begins a
    new run.
    """

    title = "MLflow"

    def __init__(self, stage: TrackedStage) -> None:
        other_libraries.silence()
        from mlflow import MlflowClient, entities
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.failures: tuple[type[Exception], ...] = (MlflowException, SQLAlchemyError, OSError)
        self._entities: Any = entities
        self._directory = stage.directory / _DIRECTORY
        if wrong := [sign for sign in _NOT_IN_URI if sign in str(self._directory)]:
            raise _not_started(f"run_dir={stage.directory}: MLflow cannot open a path with {wrong[0]!r}")
        uri = f"sqlite:///{self._directory / _DATABASE}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._experiment = self._find_experiment(stage.settings.project)
            self._run = self._find_run(stage).info.run_id
        except self.failures as error:
            raise _not_started(in_one_line(error)) from error

    def _find_experiment(self, project: str) -> str:
        """Return the id of the experiment whose files are here. A run_dir that was moved needs another experiment."""
        place = (self._directory / "artifacts").as_uri()
        known: Sequence[Experiment] = self._client.search_experiments()
        for each in known:
            if each.artifact_location == place and project in (each.name, each.name.rpartition("-")[0]):
                return each.experiment_id
        taken = {each.name for each in known}
        free = (f"{project}-{number}" for number in range(2, len(taken) + 3))
        name = next(name for name in (project, *free) if name not in taken)
        return self._client.create_experiment(name, artifact_location=place)

    def _find_run(self, stage: TrackedStage) -> "Run":
        params = dict(_params(stage.config))
        found = self._client.search_runs([self._experiment], filter_string=f"tags.`{_ID}` = '{stage.id}'")
        for run in found:
            if run.data.params == params:
                self._client.update_run(run.info.run_id, status="RUNNING")
                return run
        tags = {_ID: stage.id, "stage": stage.stage, "group": stage.group, "tags": ", ".join(stage.tags)}
        tags |= {} if stage.part is None else {"part": stage.part}
        run = self._client.create_run(self._experiment, run_name=stage.title, tags={**tags, **stage.labels})
        pairs = iter(params.items())
        while batch := list(islice(pairs, _MOST_PARAMS)):
            self._client.log_batch(run.info.run_id, params=[self._entities.Param(*pair) for pair in batch])
        self._client.log_dict(run.info.run_id, dict(stage.config), "config.json")
        return run

    @property
    def hint(self) -> Hint | None:
        """The command that shows all stages. mlflow-skinny has no pages, so the command runs the whole of MLflow."""
        from mlflow import __version__

        store = shlex.quote(f"sqlite:///{self._directory / _DATABASE}")
        return Hint("to see the runs", f"pipx run mlflow=={__version__} ui --backend-store-uri {store}")

    def log(self, reading: Reading) -> None:
        """Log the numbers as metrics at their step, and the texts as tags."""
        milliseconds = int(reading.time * 1000)
        metrics = [
            self._entities.Metric(key, number, milliseconds, reading.step or 0)
            for key, number in reading.numbers.items()
        ]
        tags = [self._entities.RunTag(key, text) for key, text in reading.texts.items()]
        self._client.log_batch(self._run, metrics=metrics, tags=tags)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Store the table as `tables/<name>.json`, in the form of MLflow's own tables."""
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self._client.log_dict(self._run, table, f"tables/{name}.json")

    def log_media(self, images: Mapping[str, Path], pages: Mapping[str, Path]) -> None:
        """Store images in `plots` and pages in `pages`."""
        for folder, files in (("plots", images), ("pages", pages)):
            for path in files.values():
                self._client.log_artifact(self._run, str(path), folder)

    def use(self, item: Item) -> None:
        """Log a data set or a model as an input. Other inputs are stored as `inputs/<name>.json`."""
        if item.kind == DATASET:
            source = str(item.description["path"])
            dataset = self._entities.Dataset(item.name, item.fingerprint, "local", source)
            self._client.log_inputs(self._run, datasets=[self._entities.DatasetInput(dataset)])
        elif item.kind == MODEL:
            model = self._find_model(item)
            self._client.log_inputs(self._run, models=[self._entities.LoggedModelInput(model.model_id)])
        else:
            self._client.log_dict(self._run, dict(item.description), f"inputs/{item.name}.json")

    def make(self, item: Item) -> None:
        """Log a model as an output. Reports and files are stored as `<name>/<file>`."""
        if item.kind == MODEL:
            model = self._find_model(item, made_by=self._run)
            self._client.log_outputs(self._run, models=[self._entities.LoggedModelOutput(model.model_id, 0)])
            return
        self._client.log_dict(self._run, dict(item.description), f"{item.name}/description.json")
        for name, path in item.files.items():
            folder = (Path(item.name) / name).parent.as_posix()
            self._client.log_artifact(self._run, str(path), folder)

    def _find_model(self, item: Item, made_by: str | None = None) -> "LoggedModel":
        """Return MLflow's entry of a model, which is created if no stage has logged these contents here."""
        asked = f"tags.{_FINGERPRINT} = '{item.fingerprint}' AND name = '{_model_name(item)}'"
        if found := self._client.search_logged_models([self._experiment], filter_string=asked):
            return found[0]
        texts = {key: text for part in split(item.description, "model") for key, text in _texts(part)}
        created = self._client.create_logged_model(
            self._experiment,
            name=_model_name(item),
            source_run_id=made_by,
            tags={**texts, _FINGERPRINT: item.fingerprint},
            model_type=item.kind,
        )
        return self._client.finalize_logged_model(created.model_id, "READY")

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Log the figures as metrics of the run."""
        self.log(Reading(time.time(), None, figures, {}))

    def finish(self, succeeded: bool) -> None:
        """Set the status of the run."""
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")


def _model_name(item: Item) -> str:
    return item.name.replace(".", "_")  # MLflow refuses dots in names of models


def _params(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings as flat texts. config.json holds longer ones."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _params(value, f"{prefix}{name}.")
        elif len(text := str(value)) <= _LONGEST_PARAM:
            yield f"{prefix}{name}", text


def _texts(part: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    return ((key, str(value)) for key, value in part.items())


def _not_started(reason: str) -> UserError:
    return UserError(f"tracking=mlflow: MLflow could not be started ({reason}). Set another run_dir, or tracking=none.")
