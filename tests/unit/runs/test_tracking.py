"""Messages, metrics and tables go to the console, to disk and to the tracking service.

The service may be missing, or it may fail.
"""

import json
import os
import sys
from importlib.machinery import ModuleSpec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import ModelConfig, PipelineConfig, TrackingBackend, TrackingConfig
from pipeline.errors import UserError
from pipeline.runs import console
from pipeline.runs.console import say
from pipeline.runs.metrics import forget_metrics_after, read_metrics
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_inputs, log_metrics, log_report, log_table, track


class WandbError(Exception):
    pass


class FakeRun:
    """A fake W&B run with the methods that the program calls. Every call fails while the fake package is `broken`."""

    disabled = False
    group = "group"

    def __init__(self, library: "FakeWandb", arguments: dict[str, Any]) -> None:
        self.library, self.arguments, self.lines = library, arguments, []
        self.dir = str(arguments["dir"] / "wandb" / "offline-run" / "files")
        self.exit_code: int | None = None
        self.used: list[tuple[str, str, list[str]]] = []
        self.offline = library.mode == "offline"
        self.url = "https://wandb.example/run"

    def _answer(self) -> None:
        if self.library.broken:
            raise ConnectionResetError("Connection lost")

    def define_metric(self, *_: Any, **__: Any) -> None:
        self._answer()

    def log(self, values: dict[str, Any]) -> None:
        self._answer()
        self.lines.append(values)

    def use_artifact(self, artifact: "FakeArtifact", aliases: list[str]) -> None:
        self._answer()
        self.used.append((artifact.name, artifact.type, aliases))

    def finish(self, exit_code: int) -> None:
        self._answer()
        self.exit_code = exit_code


class FakeArtifact(SimpleNamespace):
    """A fake W&B artifact."""

    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        super().__init__(name=name, type=type, metadata=metadata, file=StringIO())

    def new_file(self, *_: str, **__: str) -> StringIO:
        return self.file


class FakeWandb(SimpleNamespace):
    """Replaces the wandb package in tests in which the package must fail."""

    __spec__ = ModuleSpec("wandb", None)
    errors = SimpleNamespace(Error=WandbError, UsageError=WandbError)
    Settings = SimpleNamespace
    Artifact = FakeArtifact

    def __init__(self, mode: str = "offline", has_login: bool = True, refusal: Exception | None = None) -> None:
        super().__init__(broken=False, runs=[])
        self.mode, self.has_login, self.refusal = mode, has_login, refusal

    def setup(self, _: Any) -> Any:
        return SimpleNamespace(settings=SimpleNamespace(mode=self.mode))

    def login(self, **_: Any) -> bool:
        return self.has_login

    def init(self, **arguments: Any) -> FakeRun:
        if self.refusal is not None:
            raise self.refusal
        self.runs.append(FakeRun(self, arguments))
        return self.runs[-1]


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    config = PipelineConfig(run_dir=str(tmp_path), recipe="smoke")
    config.tracking = TrackingConfig(backend=TrackingBackend.wandb)
    return config


def installed(monkeypatch: pytest.MonkeyPatch, **behaviour: Any) -> FakeWandb:
    fake = FakeWandb(**behaviour)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return fake


def test_metrics_are_read_as_they_were_written_but_for_a_torn_last_line(tmp_path: Path) -> None:
    log_metrics(tmp_path, {"step": 1, "loss": 0.5})
    log_metrics(tmp_path, {"step": 2, "loss": 0.25})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 0.25)]
    assert all(line["time"] > 0 for line in lines)


def test_steps_that_will_be_repeated_are_forgotten(tmp_path: Path) -> None:
    for step in (0, 2, 4, 6):
        log_metrics(tmp_path, {"step": step})
    forget_metrics_after(tmp_path, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 4]


def test_only_the_main_process_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    say("sft", "hello")
    console.warn("sft", "hello")
    log_metrics(tmp_path, {"step": 1})
    log_table(tmp_path, "examples", ["text"], [["a"]])
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_table_is_kept_as_one_object_per_row(tmp_path: Path) -> None:
    log_table(tmp_path, "examples", ["prompt", "score"], [["日本", 1.5], ["b", None]])
    lines = (tmp_path / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"prompt": "日本", "score": 1.5}'
    assert json.loads(lines[1]) == {"prompt": "b", "score": None}


def test_a_row_of_another_length_than_the_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        log_table(tmp_path, "examples", ["a", "b"], [["only one"]])


def test_nothing_of_wandb_is_touched_without_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with track(Run(PipelineConfig()), "sft", tmp_path):
        log_metrics(tmp_path, {"step": 1})
        log_report([])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_do_not_talk_to_wandb(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = installed(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    with track(Run(config), "sft", tmp_path):
        pass
    assert fake.runs == []


def test_stages_share_a_group_and_a_repeated_stage_keeps_its_run(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = installed(monkeypatch)
    for stage in ("sft", "qat", "sft"):
        with track(Run(config), stage, tmp_path):
            pass
        config.tracking.name = "renamed later"
    sft, qat, again = (run.arguments for run in fake.runs)
    assert sft["group"] == qat["group"] == again["group"]
    assert sft["group"].startswith("smoke-")
    assert sft["id"] == again["id"] != qat["id"]
    assert {run["resume"] for run in (sft, qat, again)} == {"allow"}
    assert [run["name"] for run in (sft, qat)] == ["smoke-sft", "renamed later-qat"]


def test_metrics_go_to_both_and_a_stage_that_fails_is_shown_as_failed(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = installed(monkeypatch)
    with pytest.raises(KeyboardInterrupt), track(Run(config), "sft", tmp_path):
        log_metrics(tmp_path, {"step": 1, "loss": 0.5})
        raise KeyboardInterrupt
    (run,) = fake.runs
    assert run.lines == [{"step": 1, "sft/loss": 0.5}]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5]
    assert run.exit_code == 1
    log_metrics(tmp_path, {"step": 2})
    assert len(run.lines) == 1


def test_places_for_wandbs_files_are_the_runs_unless_the_user_chose_others(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch)
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    monkeypatch.setenv("WANDB_CACHE_DIR", "/chosen")
    with track(Run(config), "sft", tmp_path):
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / "wandb")
        assert os.environ["WANDB_CACHE_DIR"] == "/chosen"
    assert "WANDB_DATA_DIR" not in os.environ


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"mode": "online", "has_login": False}, "(no login)"),
        ({"refusal": WandbError("no such host\nConsider more\ntime")}, "(no such host Consider more time)"),
        ({"refusal": ValueError("project: too long")}, "(project: too long)"),
        ({"refusal": OSError("no space left")}, "(no space left)"),
    ],
)
def test_a_service_that_cannot_be_started_is_one_message(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: dict[str, Any], reason: str
) -> None:
    installed(monkeypatch, **behaviour)
    with pytest.raises(UserError) as caught, track(Run(config), "sft", tmp_path):
        pytest.fail("the stage must not begin")
    assert str(caught.value).startswith("tracking=wandb: W&B could not be started " + reason)
    assert "tracking=none" in str(caught.value)


def test_a_missing_package_is_a_message_that_says_how_to_install_it(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'gpt-oss-qat\[wandb\]'"), track(Run(config), "sft", tmp_path):
        pass


def test_a_connection_that_breaks_later_is_one_warning_and_costs_no_metrics(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = installed(monkeypatch)
    with track(Run(config), "sft", tmp_path):
        log_metrics(tmp_path, {"step": 1})
        fake.broken = True
        for step in (2, 3):
            log_metrics(tmp_path, {"step": step})
    expected = (
        "[sft] warning: W&B failed (Connection lost): going on without it. metrics.jsonl has everything."
        f" To upload what W&B has on disk: wandb sync {tmp_path}/wandb/offline-run\n"
    )
    assert capsys.readouterr().err == expected
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_online_inputs_are_declared_by_use_artifact_and_nothing_is_left_to_upload(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = installed(monkeypatch, mode="online")
    config.model = ModelConfig(path="openai/gpt-oss-20b")
    run = Run(config)
    with track(run, "upcast", tmp_path):
        log_inputs(run, {"source": "f" * 32}, None)
    assert fake.runs[0].used == [("base-gpt-oss-20b", "model", ["f" * 12])]
    assert capsys.readouterr().out == "[upcast] W&B: https://wandb.example/run\n"


def test_the_command_is_printed_by_each_stage_if_nothing_collects_it(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch)
    with track(Run(config), "sft", tmp_path):
        pass
    assert (
        f"[sft] to upload the offline runs to W&B: wandb sync {tmp_path}/wandb/offline-run-*" in capsys.readouterr().out
    )


@pytest.mark.parametrize("content", ["", "[]", '{"id": "a"}', "{"])
def test_an_unreadable_identity_is_one_message_with_its_file(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    installed(monkeypatch)
    (tmp_path / "tracking.json").write_text(content)
    with pytest.raises(UserError, match=r"tracking\.json: not readable"), track(Run(config), "sft", tmp_path):
        pass
