"""MLflow's own client finds runs, figures, files and lineage in the database."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tracked_stages import DATA, FIGURES, KEPT_LOSS, LOSSES, SECRET, build_stages, configuration, verify_targets

from pipeline.config import PipelineConfig, TrackingBackend, Upload
from pipeline.errors import UserError
from pipeline.runs import other_libraries
from pipeline.runs.artifacts import Artifact
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics, one_hint, track

other_libraries.silence()
from mlflow import MlflowClient  # noqa: E402 - mlflow reads on import what `silence` sets
from mlflow.entities import Run as MlflowRun  # noqa: E402


class Store:
    """A run directory with two tracked stages, and MLflow's client for it."""

    def __init__(self, run_dir: Path) -> None:
        self.config = configuration(run_dir, TrackingBackend.mlflow, Upload.models)
        with one_hint("all"):
            self.upcast, self.sft = build_stages(self.config)
        self.client = MlflowClient(f"sqlite:///{run_dir}/mlflow/mlflow.db")

    def runs(self, name: str) -> list[MlflowRun]:
        found = self.client.search_runs(["1"], f"attributes.run_name = '{name}'", order_by=["attributes.start_time"])
        return [self.client.get_run(run.info.run_id) for run in found]

    def files(self, run: MlflowRun, folder: str | None = None) -> Iterator[str]:
        for each in self.client.list_artifacts(run.info.run_id, folder):
            yield from self.files(run, each.path) if each.is_dir else [each.path]

    def fingerprint(self, model_id: str) -> str:
        return self.client.get_logged_model(model_id).tags["fingerprint"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Making MLflow's database takes seconds, so the tests share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("current"))
        found = Store(tmp_path_factory.mktemp("tracked") / "a run")
        assert list(Path.cwd().iterdir()) == []
    return found


def test_curves_final_figures_and_tags_are_in_the_database(store: Store) -> None:
    (run,) = store.runs("smoke-sft")
    history = store.client.get_metric_history(run.info.run_id, "sft/eval_loss")
    assert {point.step: point.value for point in history} == LOSSES
    assert run.data.metrics["sft/validation_loss"] == KEPT_LOSS
    assert "sft/nothing" not in run.data.metrics
    assert run.info.status == "FINISHED"
    assert run.data.params["sft.learning_rate"] == str(store.config.sft.learning_rate)
    labels = {name: run.data.tags[name] for name in ("recipe", "model", "format", "stage", "tags")}
    assert labels == {
        "recipe": "smoke",
        "model": "gpt-oss-20b",
        "format": "mxfp4",
        "stage": "sft",
        "tags": "one, smoke, gpt-oss-20b, mxfp4",
    }


def test_the_data_set_and_the_models_are_connected(store: Store) -> None:
    (upcast,), (sft,) = store.runs("smoke-upcast"), store.runs("smoke-sft")
    (data,) = (used.dataset for used in sft.inputs.dataset_inputs)
    assert (data.name, data.digest) == ("data-rows.jsonl", DATA)
    (base,) = (store.client.get_logged_model(used.model_id) for used in upcast.inputs.model_inputs)
    assert (base.name, base.tags["model/path"]) == ("base-gpt-oss-20b", "openai/gpt-oss-20b")
    (used,), (made,) = sft.inputs.model_inputs, upcast.outputs.model_outputs
    assert used.model_id == made.model_id
    assert store.fingerprint(used.model_id) == store.upcast.fingerprint
    assert [store.fingerprint(each.model_id) for each in sft.outputs.model_outputs] == [store.sft.fingerprint]


def test_plots_pages_tables_and_weights_are_stored_if_the_user_asks_for_them(store: Store) -> None:
    (run,) = store.runs("smoke-sft")
    found = set(store.files(run))
    assert {"config.json", "plots/loss.png", "pages/page.html", "tables/samples.json"} <= found
    assert "smoke-sft-files/model.safetensors" in found
    path = store.client.download_artifacts(run.info.run_id, "smoke-sft-files/model.safetensors")
    assert Path(path).read_bytes() == b"trained"
    table = json.loads(Path(store.client.download_artifacts(run.info.run_id, "tables/samples.json")).read_text())
    assert table == {"columns": ["prompt", "answer"], "data": [["a|b", "c"], ["d", {"e": 1}]]}


def test_no_secret_is_in_the_store(store: Store) -> None:
    files = [path for path in (store.sft.directory.parent / "mlflow").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def track_again(store: Store, config: PipelineConfig) -> None:
    with track(Run(config), "sft", Path(config.run_dir)):
        log_metrics(Path(config.run_dir), {"step": 6, "eval_loss": 9.0})


def test_a_stage_continues_its_run_unless_its_settings_change(store: Store) -> None:
    track_again(store, store.config)
    (run,) = store.runs("smoke-sft")
    assert run.data.metrics["sft/eval_loss"] == 9.0
    changed = configuration(Path(store.config.run_dir), TrackingBackend.mlflow, Upload.models)
    changed.sft.learning_rate = 0.5
    track_again(store, changed)
    assert [each.data.params["sft.learning_rate"] for each in store.runs("smoke-sft")][1:] == ["0.5"]


def test_a_path_that_mlflow_cannot_open_is_one_message(tmp_path: Path) -> None:
    directory = tmp_path / "50%"
    directory.mkdir()
    run = Run(configuration(directory, TrackingBackend.mlflow))
    expected = r"tracking=mlflow: .*cannot open a path with '%'.*Set another run_dir"
    with pytest.raises(UserError, match=expected), track(run, "sft", directory):
        pytest.fail("the stage must not begin")


def test_a_damaged_database_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"not a database" * 100)
    run = Run(configuration(tmp_path, TrackingBackend.mlflow))
    expected = r"tracking=mlflow: MLflow could not be started .*file is not a database"
    with pytest.raises(UserError, match=expected), track(run, "sft", tmp_path):
        pytest.fail("the stage must not begin")


def test_a_failure_while_the_stage_runs_is_one_warning(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> Artifact:
        raise OSError("disk I/O error")

    directory = Path(store.config.run_dir)
    with track(Run(store.config), "sft", directory):
        monkeypatch.setattr(MlflowClient, "log_batch", fail)
        log_metrics(directory, {"step": 1})
        log_metrics(directory, {"step": 1, "loss": 1.0})
    assert capsys.readouterr().err.count("[sft] warning: MLflow failed (disk I/O error): going on without it.") == 1


def test_the_proofs_of_two_exports_are_two_runs(store: Store) -> None:
    verify_targets(store.config)
    for target, figure in FIGURES.items():
        (run,) = store.runs(f"smoke-verify-{target.name}")
        assert run.data.metrics["verify/tensors"] == figure
        assert (run.data.tags["stage"], run.data.tags["part"]) == ("verify", target.name)
