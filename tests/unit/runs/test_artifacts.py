"""Building a stage: new, unfinished, complete, up-to-date and changed directories. Also metrics.jsonl."""

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pipeline import __main__ as program
from pipeline import __version__
from pipeline.config import (
    BlendPartConfig,
    DataConfig,
    LoraTarget,
    ModelConfig,
    PipelineConfig,
    Stage,
    ValidationConfig,
    command_line,
)
from pipeline.errors import CheckFailed, MachineError, UserError
from pipeline.runs import artifacts, building, console, metrics, provenance, stopping, tracking
from pipeline.runs.artifacts import Artifact, Kind, Result, digest_of, fingerprint_of, load
from pipeline.runs.building import build
from pipeline.runs.json_files import write_json
from pipeline.runs.records import StageRecord
from pipeline.runs.run import Run
from pipeline.runs.stopping import Stopped
from pipeline.training import resume

PAYLOAD = {"model.safetensors": b"weights", "sub/config.json": b"{}"}
FIXED = "a-fixed-fingerprint"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig(
        stage=Stage.sft,
        recipe="smoke",
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(path="owner/name", revision="abc"),
        data=DataConfig(path="rows.jsonl"),
    )


@dataclass(frozen=True, kw_only=True)
class Steps(StageRecord):
    """A record with one figure."""

    steps: int


class Work:
    """Writes a payload. At each call, it records which files were already in the directory."""

    def __init__(self, payload: dict[str, bytes] = PAYLOAD, error: BaseException | None = None, **result: Any) -> None:
        self.payload = payload
        self.error = error
        self.result = Result(**{"kind": Kind.checkpoint, "format": "bfloat16", "record": Steps(steps=3), **result})
        self.found: list[set[str]] = []

    def __call__(self, directory: Path) -> Result:
        self.found.append(files_in(directory))
        for name, content in self.payload.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def calls(self) -> int:
        return len(self.found)


def files_in(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def make(config: PipelineConfig, work: Callable[[Path], Result] | None = None, **changes: Any) -> Artifact:
    """Build sft from upcast and the data set."""
    inputs = {"settings": ("data", "sft"), "parents": {"upcast": FIXED}, "data": "rows-1", **changes}
    return build(Run(config), Stage.sft, work=work or Work(), resumable_as=resume.by_global_batch, **inputs)


def begin(config: PipelineConfig, **changes: Any) -> Path:
    """Leave an unfinished sft behind."""
    with pytest.raises(RuntimeError, match="power cut"):
        make(config, Work({"shard-1": b"half"}, RuntimeError("power cut")), **changes)
    return Run(config).stage_dir("sft")


def error_of(config: PipelineConfig, work: Callable[[Path], Result] | None = None, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(config, work, **changes)
    return str(caught.value)


def record_of(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.directory / "artifact.json").read_text(encoding="utf-8"))


# --- a new stage -----------------------------------------------------------------------------------------------------


def test_artifact_json_is_written_last(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, set[str]]] = []

    def watched(path: Path, content: Any) -> None:
        written.append((path.name, files_in(path.parent)))
        write_json(path, content)

    monkeypatch.setattr(building, "write_json", watched)
    artifact = make(config)
    name, there_before = written[-1]
    assert name == "artifact.json"
    assert there_before >= {*PAYLOAD, "config.yaml"}
    assert files_in(artifact.directory) == {*PAYLOAD, "config.yaml", "artifact.json"}


def test_the_payload_is_on_the_disk_before_artifact_json(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    synced_before: set[str] = set()
    replace = Path.replace

    def watch_replace(source: Path, target: Path) -> Path:
        if target.name == "artifact.json":
            synced_before.update(synced)
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Path, "replace", watch_replace)
    directory = make(config).directory
    assert {str(directory / name) for name in (*PAYLOAD, "config.yaml")} <= synced_before


def test_work_that_fails_leaves_no_artifact(config: PipelineConfig) -> None:
    directory = begin(config)
    assert not Run(config).is_complete(Stage.sft)
    assert files_in(directory) == {"shard-1", "config.yaml", "unfinished.json"}


def test_an_artifact_says_all_that_the_contract_asks_for(config: PipelineConfig) -> None:
    record = record_of(make(config))
    fingerprint, sizes, digests = fingerprint_of(Run(config).stage_dir("sft"))
    records = {"config.yaml": digest_of(Run(config).stage_dir("sft") / "config.yaml")}
    expected = {
        "version": 2,
        "digests": {**digests, **records},
        "program": __version__,
        "stage": "sft",
        "kind": "checkpoint",
        "format": "bfloat16",
        "fake_quantized": None,
        "fingerprint": fingerprint,
        "parents": {"upcast": FIXED},
        "base_model": {"path": "owner/name", "revision": "abc"},
        "data": "rows-1",
        "details": {"steps": 3},
        "files": sizes,
    }
    assert {key: record[key] for key in expected} == expected
    assert sizes == {name: len(content) for name, content in PAYLOAD.items()}
    assert record["settings"]["sft.learning_rate"] == 2e-5
    assert record["settings"]["data.supervise"] == "every_turn"
    assert {"torch", "transformers", "trl", "peft", "nvidia-modelopt"} <= set(record["libraries"])
    assert record["host"] and record["device"]
    assert record["seconds"] >= 0 and record["peak_memory_bytes"] > 1e6
    assert "git_commit" in record


def test_an_artifact_read_again_is_the_one_that_was_made(config: PipelineConfig) -> None:
    made = make(config, Work(kind=Kind.adapter, fake_quantized="mxfp4"))
    assert made == load(made.directory) == Run(config).require(Stage.sft)
    assert (made.kind, made.fake_quantized) == (Kind.adapter, "mxfp4")


def test_config_yaml_holds_the_resolved_configuration(config: PipelineConfig) -> None:
    directory = make(config).directory
    read = OmegaConf.merge(OmegaConf.structured(PipelineConfig), OmegaConf.load(directory / "config.yaml"))
    assert OmegaConf.to_object(read) == config


def test_checkpoints_to_resume_from_are_removed_when_the_stage_is_complete(config: PipelineConfig) -> None:
    artifact = make(config, Work({**PAYLOAD, "checkpoints/step-2": b"state"}))
    assert set(artifact.files) == set(PAYLOAD)
    assert not (artifact.directory / "checkpoints").exists()


def test_settings_are_recorded_flat_and_by_name(config: PipelineConfig) -> None:
    config.sft.lora.targets = [LoraTarget.experts]
    assert Run(config).settings(("data.supervise", "model.revision", "sft.lora")) == {
        "data.supervise": "every_turn",
        "model.revision": "abc",
        "sft.lora.rank": 8,
        "sft.lora.alpha": 16,
        "sft.lora.targets": ["experts"],
        "sft.lora.layers": None,
        "sft.lora.every_nth": None,
    }


# --- a complete stage ------------------------------------------------------------------------------------------------


def test_a_stage_that_is_up_to_date_does_nothing(config: PipelineConfig, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work()
    first = make(config, work)
    before = (first.directory / "artifact.json").stat().st_mtime_ns
    capsys.readouterr()
    assert make(config, work) == first
    assert work.calls == 1
    assert (first.directory / "artifact.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == f"[sft] up to date: {first.directory}\n"


def test_settings_that_the_result_does_not_depend_on_may_change(config: PipelineConfig) -> None:
    work = Work()
    make(config, work)
    config.qat.learning_rate = 1.0
    config.model.path = "elsewhere"
    make(config, work)
    assert work.calls == 1


def test_a_changed_setting_is_an_error_that_names_key_and_both_values(config: PipelineConfig) -> None:
    make(config)
    config.sft.learning_rate = 0.5
    config.sft.lora.targets = [LoraTarget.experts]
    config.data.max_samples = 7
    message = error_of(config, work := Work())
    assert message == (
        f"{Run(config).stage_dir('sft')} is complete, but was made with other inputs: data.max_samples: was None, is 7;"
        " sft.learning_rate: was 2e-05, is 0.5; sft.lora.targets: was ['attention', 'experts'], is ['experts']."
        f" Go back to them, or rebuild it: python -m pipeline stage=sft recipe=smoke run_dir={config.run_dir}"
        " overwrite=true. To keep it, use another run_dir."
    )
    assert work.calls == 0
    assert Run(config).is_complete(Stage.sft)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"parents": {"upcast": "other"}}, "upcast: was 'a-fixed-fingerprint', is 'other'"),
        ({"parents": {"upcast": FIXED, "base": "x"}}, "base: was None, is 'x'"),
        ({"data": "rows-2"}, "the data set's contents: fingerprint was rows-1, is rows-2"),
    ],
    ids=["a parent", "one parent more", "the data"],
)
def test_a_changed_parent_or_data_set_is_an_error_that_names_it(
    changes: dict[str, Any], difference: str, config: PipelineConfig
) -> None:
    make(config)
    assert f"but was made with other inputs: {difference}. Go back to them, or rebuild it: " in error_of(
        config, **changes
    )


PLACES: dict[str, dict[str, Any]] = {
    "another path": {"path": "./rows.jsonl"},
    "a copy on the hub": {"path": "owner/rows", "revision": "abc"},
    "a validation set": {"validation": ValidationConfig(path="./held_out.jsonl")},
    "a blend": {"blend": [BlendPartConfig(path="./a.jsonl", weight=1), BlendPartConfig(path="./b.jsonl", weight=2)]},
}


def at(place: dict[str, Any]) -> DataConfig:
    """Return the settings of the same data set, with its files at other places."""
    before = {
        "validation": ValidationConfig(path="held_out.jsonl"),
        "blend": [BlendPartConfig(path="a.jsonl", weight=1), BlendPartConfig(path="b.jsonl", weight=2)],
    }
    return DataConfig(path="rows.jsonl", **{name: value for name, value in before.items() if name in place})


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_data_set_with_the_same_contents_is_the_same_at_another_place(
    place: dict[str, Any], config: PipelineConfig
) -> None:
    config.data = at(place)
    made = make(config)
    config.data = replace(config.data, **place)
    assert make(config, work := Work()).fingerprint == made.fingerprint
    assert work.calls == 0
    assert "data" in error_of(config, data="rows-2")


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_unfinished_work_goes_on_with_the_same_contents_at_another_place(
    place: dict[str, Any], config: PipelineConfig
) -> None:
    config.data = at(place)
    begin(config)
    config.data = replace(config.data, **place)
    make(config, work := Work())
    assert work.found == [{"shard-1", "config.yaml", "unfinished.json"}]


def test_another_weight_of_a_blend_is_another_input(config: PipelineConfig) -> None:
    config.data = at({"blend": None})
    make(config)
    config.data.blend[0].weight = 5
    assert "data.blend: was" in error_of(config)


def test_overwrite_rebuilds_from_an_empty_directory(config: PipelineConfig) -> None:
    make(config, Work({"old": b"1"}))
    config.overwrite = True
    config.sft.learning_rate = 0.5
    work = Work({"new": b"2"})
    artifact = make(config, work)
    assert work.found == [{"config.yaml", "unfinished.json"}]
    assert set(artifact.files) == {"new"}
    assert artifact.settings["sft.learning_rate"] == 0.5


def test_files_behind_a_link_are_never_deleted(config: PipelineConfig, tmp_path: Path) -> None:
    made = make(config)
    other = dataclasses.replace(config, run_dir=str(tmp_path / "other"), overwrite=True)
    Path(other.run_dir).mkdir()
    (Path(other.run_dir) / "sft").symlink_to(made.directory)
    before = files_in(made.directory)
    with pytest.raises(UserError, match=r"is a symbolic link to .*Remove the link"):
        make(other)
    assert files_in(made.directory) == before


def test_overwrite_rebuilds_what_is_up_to_date_too(config: PipelineConfig) -> None:
    work = Work()
    make(config, work)
    config.overwrite = True
    make(config, work)
    assert work.calls == 2


def test_a_rebuild_with_the_same_result_leaves_what_depends_on_it_up_to_date(config: PipelineConfig) -> None:
    before = make(config).fingerprint
    config.overwrite = True
    config.sft.logging_steps = 7
    assert make(config).fingerprint == before


# --- an unfinished stage ---------------------------------------------------------------------------------------------


def test_unfinished_work_with_the_same_inputs_is_handed_on_with_its_files(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = begin(config)
    work = Work()
    artifact = make(config, work)
    assert work.found == [{"shard-1", "config.yaml", "unfinished.json"}]
    assert set(artifact.files) == {"shard-1", *PAYLOAD}
    assert f"[sft] resuming what was interrupted in {directory}\n" in capsys.readouterr().out


def test_unfinished_work_with_other_inputs_is_an_error_and_stays(config: PipelineConfig) -> None:
    directory = begin(config)
    config.sft.learning_rate = 0.5
    message = error_of(config, work := Work())
    assert message.startswith(
        f"{directory} is unfinished, and was begun with other inputs: sft.learning_rate: was 2e-05, is 0.5."
    )
    assert work.calls == 0
    assert (directory / "shard-1").read_bytes() == b"half"


def test_unfinished_training_goes_on_if_processes_and_batches_make_the_same_global_batch(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.sft.batch_size, config.sft.gradient_accumulation_steps = 2, 6
    directory = begin(config)
    monkeypatch.setattr(resume, "process_count", lambda: 3)
    message = error_of(config)
    assert message == (
        f"{directory} is unfinished, and was begun with other inputs: sft.batch_size x sft.gradient_accumulation_steps"
        " x processes: was 12, is 36. Go on with the same inputs, or rebuild it: python -m pipeline stage=sft"
        f" recipe=smoke run_dir={config.run_dir} overwrite=true. To keep it, use another run_dir."
    )
    config.sft.gradient_accumulation_steps = 2
    make(config, work := Work())
    assert "shard-1" in work.found[0]


def test_a_complete_stage_is_up_to_date_on_any_number_of_processes(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(config)
    monkeypatch.setattr(resume, "process_count", lambda: 2)
    assert make(config, work := Work()).fingerprint == made.fingerprint
    assert work.calls == 0


def test_overwrite_discards_unfinished_work_with_other_inputs(config: PipelineConfig) -> None:
    begin(config)
    config.overwrite = True
    config.sft.learning_rate = 0.5
    work = Work()
    assert set(make(config, work).files) == set(PAYLOAD)
    assert "shard-1" not in work.found[0]


def kill_at(call: int, patched: pytest.MonkeyPatch) -> None:
    """Kill the program at one of its deletions and renames. `call` counts them from 0."""
    left = iter(range(call))

    def wrap(function: Callable[..., object]) -> Callable[..., object]:
        def act(*arguments: Any, **named: Any) -> object:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return act

    for owner, name in ((Path, "unlink"), (Path, "replace"), (shutil, "rmtree")):
        patched.setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize("call", range(7))
@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "unfinished"])
def test_a_kill_while_earlier_files_are_discarded_never_mixes_them_with_new_ones(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, call: int, is_complete: bool
) -> None:
    error = None if is_complete else RuntimeError("power cut")
    with nullcontext() if is_complete else pytest.raises(RuntimeError):
        make(config, Work({"shard-1": b"old", "more/shard-2": b"old"}, error))
    config.overwrite = True
    config.sft.learning_rate = 0.5
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_at(call, patched)
        make(config, Work({}, KeyboardInterrupt()))
    config.overwrite = False
    directory, work = Run(config).stage_dir("sft"), Work()
    if call < 1 + is_complete:  # nothing was deleted
        assert error_of(config, work).startswith(f"{directory} is ")
        assert (directory / "more" / "shard-2").read_bytes() == b"old"
    else:
        assert set(make(config, work).files) == set(PAYLOAD)
        assert work.found == [{"config.yaml", "unfinished.json"}]


def test_a_kill_before_unfinished_json_has_its_name_does_not_lock_the_stage(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        kill_at(0, patched)
        make(config)
    assert files_in(Run(config).stage_dir("sft")) == {"unfinished.json.tmp"}
    assert set(make(config).files) == set(PAYLOAD)


def test_a_stage_that_another_run_has_just_completed_is_not_emptied(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run completes the stage after this run has looked for it, and before this run has the lock."""
    made = make(config)
    monkeypatch.setattr(building, "_find_up_to_date", lambda *_: None)
    message = error_of(config, work := Work())
    assert message == f"{made.directory}: another run has just completed this stage. Run the same command again."
    assert work.calls == 0 and load(made.directory).fingerprint == made.fingerprint


def test_shards_of_a_base_below_the_stage_are_no_payload_and_are_removed_at_the_end(config: PipelineConfig) -> None:
    made = make(config, Work({"base/model.safetensors": b"weights", "base/shards.json": b"{}"}))
    assert set(made.files) == {"base/model.safetensors"}
    assert not (made.directory / "base" / "shards.json").exists()


def test_a_signal_that_came_too_late_for_a_step_stops_the_program_after_the_stage(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_asked", signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM after stage=sft"):
        make(config)
    assert Run(config).is_complete(Stage.sft)


def test_a_file_system_without_locks_is_one_message(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(building.fcntl, "flock", refuse)
    with pytest.raises(MachineError, match=r"cannot lock files \(No locks available\).*Set run_dir to another"):
        make(config)


def test_a_line_that_was_torn_by_a_kill_is_cut_before_work_resumes(config: PipelineConfig) -> None:
    directory = begin(config)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    make(config, keeps_metrics=True)
    assert (directory / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_stage_that_writes_all_its_figures_again_resumes_without_the_earlier_lines(config: PipelineConfig) -> None:
    directory = begin(config)
    (directory / "metrics.jsonl").write_text('{"layer": 0}\n')
    make(config)
    assert not (directory / "metrics.jsonl").exists()


def test_an_interrupted_rebuild_goes_on_where_it_was(config: PipelineConfig) -> None:
    make(config, Work({"old": b"1"}))
    config.overwrite = True
    begin(config)
    work = Work()
    assert set(make(config, work).files) == {"shard-1", *PAYLOAD}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_someone_else_are_an_error_and_stay(overwrite: bool, config: PipelineConfig) -> None:
    directory = Run(config).stage_dir("sft")
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    config.overwrite = overwrite
    message = error_of(config, work := Work())
    assert message == (
        f"{directory}: holds files that this program did not write. Move them away, or set another run_dir."
    )
    assert work.calls == 0
    assert files_in(directory) == {"thesis.tex"}


def test_an_empty_directory_is_taken(config: PipelineConfig) -> None:
    Run(config).stage_dir("sft").mkdir(parents=True)
    assert set(make(config).files) == set(PAYLOAD)


@pytest.mark.parametrize("step", [(building, "fingerprint_of"), (provenance, "record")], ids=lambda step: step[1])
def test_an_interruption_while_publishing_can_be_resumed(
    step: tuple[Any, str], config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(config)
    assert set(make(config).files) == set(PAYLOAD)


def test_a_half_written_artifact_json_is_not_taken_for_payload(config: PipelineConfig) -> None:
    directory = begin(config)
    (directory / "artifact.json.tmp").write_text('{"stage": ')
    assert set(make(config).files) == {"shard-1", *PAYLOAD}


@pytest.mark.parametrize("where", ["run", "run/sft"])
def test_a_run_directory_that_cannot_be_written_is_a_mistake_of_the_user(
    where: str, config: PipelineConfig, tmp_path: Path
) -> None:
    blocker = tmp_path / where
    blocker.parent.mkdir(exist_ok=True)
    blocker.write_text("a regular file")
    message = error_of(config, work := Work())
    assert message.startswith(f"run_dir={config.run_dir}: cannot write {Run(config).stage_dir('sft')} (")
    assert message.endswith("Set run_dir to a writable place.")
    assert work.calls == 0


def test_a_run_directory_below_a_regular_file_is_a_mistake_of_the_user(config: PipelineConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a regular file")
    config.run_dir = str(tmp_path / "file" / "deep" / "run")
    assert error_of(config).startswith(f"run_dir={config.run_dir}: cannot write ")


# --- reports ---------------------------------------------------------------------------------------------------------


def make_report(config: PipelineConfig, work: Work, parents: dict[str, str]) -> Artifact:
    return build(Run(config), Stage.compare, settings=("evaluate",), parents=parents, work=work, is_report=True)


def test_a_report_is_made_anew_when_its_inputs_changed_and_says_so(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Work({"table.json": b"1"}, kind=Kind.report)
    make_report(config, first, {"evaluate": "one"})
    directory = Run(config).stage_dir("compare")
    tracking.log_metrics(directory, {"loss": 1.0})
    capsys.readouterr()
    second = Work({"plot.svg": b"2"}, kind=Kind.report)
    artifact = make_report(config, second, {"evaluate": "two"})
    assert "[compare] made anew, since evaluate: was 'one', is 'two'\n" in capsys.readouterr().out
    assert artifact.parents == {"evaluate": "two"}
    assert "table.json" in second.found[0] and "artifact.json" not in second.found[0]
    assert metrics.read_metrics(directory) == []


def test_a_report_that_is_up_to_date_stays(config: PipelineConfig) -> None:
    work = Work({"table.json": b"1"}, kind=Kind.report)
    make_report(config, work, {"evaluate": "one"})
    make_report(config, work, {"evaluate": "one"})
    assert work.calls == 1


def test_overwrite_makes_a_report_from_an_empty_directory(config: PipelineConfig) -> None:
    make_report(config, Work({"table.json": b"1"}, kind=Kind.report), {})
    config.overwrite = True
    work = Work({"table.json": b"2"}, kind=Kind.report)
    make_report(config, work, {})
    assert work.found == [{"config.yaml", "unfinished.json"}]


def test_an_interrupted_report_is_made_again(config: PipelineConfig) -> None:
    with pytest.raises(RuntimeError):
        make_report(config, Work({"half.json": b"1"}, RuntimeError("power cut")), {"evaluate": "one"})
    assert not Run(config).is_complete(Stage.compare)
    make_report(config, Work({"table.json": b"1"}, kind=Kind.report), {"evaluate": "two"})
    assert Run(config).is_complete(Stage.compare)


def test_a_report_does_not_take_the_files_of_someone_else_for_its_own(config: PipelineConfig) -> None:
    directory = Run(config).stage_dir("compare")
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files that this program did not write"):
        make_report(config, Work({"table.json": b"1"}, kind=Kind.report), {})


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_noticed(config: PipelineConfig) -> None:
    directory = make(config).directory
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        load(directory)
    assert str(caught.value) == (
        f"{directory / 'model.safetensors'}: missing. Run stage=sft again with overwrite=true."
    )


def test_a_file_of_another_size_is_noticed(config: PipelineConfig) -> None:
    directory = make(config).directory
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"!")
    for look in (lambda: load(directory), lambda: make(config), lambda: Run(config).require(Stage.sft)):
        with pytest.raises(
            UserError, match=r"model\.safetensors: changed in size since it was written\. Run stage=sft"
        ):
            look()
    assert load(directory, check_files=False).files["model.safetensors"] == len(b"weights")


def test_a_damaged_stage_is_rebuilt_with_overwrite(config: PipelineConfig) -> None:
    directory = make(config).directory
    (directory / "model.safetensors").unlink()
    config.overwrite = True
    assert make(config) == load(directory)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"kind": "poem"}', "[]", "\ufeff{}"])
def test_an_artifact_json_that_is_not_one_is_a_mistake_of_the_user(content: str, config: PipelineConfig) -> None:
    directory = make(config).directory
    (directory / "artifact.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"artifact\.json: not a readable artifact .* overwrite=true"):
        load(directory)


def test_a_missing_stage_is_named_with_the_command_that_makes_it(config: PipelineConfig) -> None:
    with pytest.raises(UserError) as caught:
        Run(config).require(Stage.upcast)
    assert str(caught.value) == (
        f"stage=sft needs {Run(config).stage_dir('upcast')}, which is missing."
        f" Run first: python -m pipeline stage=upcast recipe=smoke run_dir={config.run_dir}"
    )


def test_an_unfinished_stage_is_named_with_the_command_that_finishes_it(config: PipelineConfig) -> None:
    begin(config)
    config.stage = Stage.quantize
    with pytest.raises(UserError, match=r"needs .*/sft, which is unfinished\. Run first: python -m pipeline stage=sft"):
        Run(config).require(Stage.sft)


def test_the_command_that_is_given_is_a_valid_one_without_a_recipe_too(config: PipelineConfig) -> None:
    config.recipe = PipelineConfig().recipe
    with pytest.raises(UserError) as caught:
        Run(config).require(Stage.upcast)
    arguments = str(caught.value).partition("python -m pipeline ")[2].split()
    assert command_line.problems(arguments, program.FOLDERS) == []


def test_a_stage_is_complete_when_its_artifact_json_is_there(config: PipelineConfig) -> None:
    assert not Run(config).is_complete(Stage.sft)
    begin(config)
    assert not Run(config).is_complete(Stage.sft)
    make(config)
    assert Run(config).is_complete(Stage.sft)


def test_a_run_directory_may_be_relative_or_begin_with_a_tilde(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for run_dir in ("runs/a", "~/runs/a"):
        config.run_dir = run_dir
        assert Run(config).stage_dir("sft") == tmp_path / "runs" / "a" / "sft"


# --- fingerprint -----------------------------------------------------------------------------------------------------


def payload(directory: Path, files: dict[str, bytes]) -> str:
    shutil.rmtree(directory, ignore_errors=True)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return fingerprint_of(directory)[0]


@pytest.mark.parametrize(
    "other",
    [
        {**PAYLOAD, "model.safetensors": b"weightz"},
        {"model.safetensors": b"weights", "sub/config.yaml": b"{}"},
        {"model.safetensors": b"weights", "config.json": b"{}"},
        {"model.safetensors": b"weights"},
        {**PAYLOAD, "more": b""},
        {"model.safetensors": b"{}", "sub/config.json": b"weights"},
    ],
    ids=["another byte", "another name", "another folder", "a file less", "an empty file more", "swapped contents"],
)
def test_the_fingerprint_depends_on_names_and_bytes(other: dict[str, bytes], tmp_path: Path) -> None:
    assert payload(tmp_path / "a", PAYLOAD) != payload(tmp_path / "b", other)


def test_the_fingerprint_does_not_depend_on_place_time_or_order_of_writing(tmp_path: Path) -> None:
    first = payload(tmp_path / "a", PAYLOAD)
    second = payload(tmp_path / "elsewhere" / "b", dict(reversed(PAYLOAD.items())))
    os.utime(tmp_path / "elsewhere" / "b" / "model.safetensors", (0, 0))
    assert first == second == fingerprint_of(tmp_path / "elsewhere" / "b")[0]


def test_the_fingerprint_does_not_depend_on_bookkeeping_files(tmp_path: Path) -> None:
    files = dict.fromkeys(("artifact.json", "config.yaml", "metrics.jsonl", "unfinished.json"), b"x")
    more = {**PAYLOAD, **files, "checkpoints/step-2/state": b"x"}
    assert payload(tmp_path / "a", PAYLOAD) == payload(tmp_path / "b", more)
    assert set(fingerprint_of(tmp_path / "b")[1]) == set(PAYLOAD)


def test_the_fingerprint_tells_one_file_from_two_with_the_same_bytes(tmp_path: Path) -> None:
    assert payload(tmp_path / "a", {"a": b"1", "b": b"2"}) != payload(tmp_path / "b", {"a": b"1b\x002"})


def test_a_large_file_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_READ_BYTES", 4)
    assert payload(tmp_path / "a", {"a": b"123456789"}) != payload(tmp_path / "b", {"a": b"123456780"})


def test_a_json_file_is_there_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"name": "Grüße"})
    with pytest.raises(TypeError):
        write_json(path, {"name": "x", "bad": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Grüße"}


# --- metrics and messages --------------------------------------------------------------------------------------------


def test_metrics_are_one_json_object_per_line(tmp_path: Path) -> None:
    tracking.log_metrics(tmp_path, {"step": 1, "loss": 2.5})
    tracking.log_metrics(tmp_path, {"step": 2, "text": "a\nb"})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    first, second = metrics.read_metrics(tmp_path)
    assert (first["step"], first["loss"], second["text"]) == (1, 2.5, "a\nb")
    assert second["time"] >= first["time"] > 1.7e9


def test_a_stage_without_metrics_has_none(tmp_path: Path) -> None:
    assert metrics.read_metrics(tmp_path) == []
    metrics.forget_metrics_after(tmp_path, 0)
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(("step", "kept"), [(0, [0, None]), (2, [0, 1, 2, None]), (9, [0, 1, 2, None, 3])])
def test_metrics_of_repeated_steps_are_forgotten(step: int, kept: list[int | None], tmp_path: Path) -> None:
    for values in ({"step": 0}, {"step": 1}, {"step": 2}, {"note": "no step"}, {"step": 3}):
        tracking.log_metrics(tmp_path, values)
    metrics.forget_metrics_after(tmp_path, step)
    assert [line.get("step") for line in metrics.read_metrics(tmp_path)] == kept


def test_a_torn_last_line_does_not_keep_a_run_from_resuming(tmp_path: Path) -> None:
    tracking.log_metrics(tmp_path, {"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "st')
    metrics.forget_metrics_after(tmp_path, 1)
    tracking.log_metrics(tmp_path, {"step": 2})
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("line", [b"\xff", b"{", b"[]", b"", b"[" * 100_000])
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: bytes) -> None:
    tracking.log_metrics(tmp_path, {"step": 1})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(CheckFailed, match=r"metrics\.jsonl: line 2 is damaged: it is not a JSON object\. Restore"):
        metrics.read_metrics(tmp_path)


def test_only_the_main_process_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking.log_metrics(tmp_path, {"step": 1})
    monkeypatch.setenv("RANK", "1")
    console.say("sft", "hello")
    console.warn("sft", "careful")
    tracking.log_metrics(tmp_path, {"step": 2})
    metrics.forget_metrics_after(tmp_path, 0)
    assert capsys.readouterr() == ("", "")
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [1]


def test_a_line_goes_to_stdout_and_a_warning_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("sft", "hello")
    console.warn("sft", "careful")
    assert capsys.readouterr() == ("[sft] hello\n", "[sft] warning: careful\n")


def test_a_setting_that_is_a_list_is_recorded_as_one(config: PipelineConfig) -> None:
    config.doctor.languages = ["en", "de"]
    assert Run(config).settings(("doctor.languages",)) == {"doctor.languages": ["en", "de"]}
