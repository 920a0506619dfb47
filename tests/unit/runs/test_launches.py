"""A launch that repeats its command rebuilds no stage that it has rebuilt already."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from evaluated import record

from pipeline.config import PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.runs import building, job, launches, rebuilding
from pipeline.runs.artifacts import Kind, Result
from pipeline.runs.records import StageRecord
from pipeline.runs.run import BEING_EMPTIED, Run, write_unfinished
from pipeline.stages.all import STAGES


def begin(monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> None:
    """Begin a command as a new process does."""
    monkeypatch.setattr(launches, "_calls", 0)
    if name is None:
        monkeypatch.delenv("GPT_OSS_QAT_LAUNCH", raising=False)
    else:
        monkeypatch.setenv("GPT_OSS_QAT_LAUNCH", name)
    launches.begin()


def build(run_dir: Path, text: str = "", parent: str = "u") -> str:
    """Build `sft` from a parent, with overwrite=true. Return the contents of its only file."""

    def work(directory: Path) -> Result:
        (directory / "model.safetensors").write_text(text)
        return Result(Kind.checkpoint, StageRecord())

    run = Run(PipelineConfig(stage=Stage.sft, run_dir=str(run_dir), overwrite=True))
    building.build(run, Stage.sft, settings=(), parents={"upcast": parent}, work=work)
    return (run_dir / "sft" / "model.safetensors").read_text()


def test_a_command_that_its_launch_repeats_keeps_what_it_has_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(monkeypatch, "first")
    assert build(tmp_path, "first") == "first"
    begin(monkeypatch, "first")
    assert build(tmp_path, "restarted") == "first"
    assert "[sft] this launch (first) has already rebuilt" in capsys.readouterr().out
    begin(monkeypatch, "second")
    assert build(tmp_path, "second") == "second"


def test_a_result_that_is_damaged_or_has_other_inputs_is_rebuilt_by_its_own_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands of one shell may have the name of one launch. `overwrite` is never ignored if it is needed."""
    begin(monkeypatch, "mine")
    assert build(tmp_path, "first") == "first"
    assert build(tmp_path, "second", parent="rebuilt") == "second"
    (tmp_path / "sft" / "model.safetensors").unlink()
    assert build(tmp_path, "third", parent="rebuilt") == "third"
    assert "has already rebuilt" not in capsys.readouterr().out


def test_every_command_without_a_launcher_rebuilds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("one", "two"):
        begin(monkeypatch)
        assert build(tmp_path, text) == text


def test_the_second_command_of_a_process_rebuilds_also_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, "mine")
    assert build(tmp_path, "first") == "first"
    launches.begin()
    assert build(tmp_path, "second") == "second"
    begin(monkeypatch, "mine")
    launches.begin()
    assert build(tmp_path, "restarted") == "second"


def test_processes_of_one_agent_belong_to_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent is the parent process, which stays the same when it starts its processes again."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    names = []
    for parent in (os.getppid(), os.getppid(), os.getpid(), 2**30):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        begin(monkeypatch)
        names.append(launches.present())
    assert names[0] == names[1] and len(set(names)) == 3


@pytest.mark.parametrize(("inherited", "names"), [({}, 1), ({"TORCHELASTIC_RUN_ID": "none"}, 2)])
def test_commands_of_a_program_that_an_agent_started_are_launches_of_their_own(
    inherited: dict[str, str], names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program has the agent's variable itself, and passes it on to its commands."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], **inherited}) as parent:
        while not Path(f"/proc/{parent.pid}/environ").read_bytes():
            time.sleep(0.01)  # it is empty for a moment while the process starts
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        found = set()
        for _ in range(2):
            begin(monkeypatch)
            found.add(launches.present())
        parent.kill()
    assert len(found) == names


def test_a_restarted_all_discards_nothing_and_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first start, `sft` alone was there. Since then, `sft` was rebuilt, and `quantize` and `qat` have begun."""
    begin(monkeypatch, "mine")
    record(tmp_path / "sft", **launches.note())
    record(tmp_path / "quantize", parents={"sft": ""}, **launches.note())
    record(tmp_path / "controls" / "more_sft" / "sft", **launches.note())
    (tmp_path / "qat" / "checkpoints").mkdir(parents=True)
    write_unfinished(tmp_path / "qat", BEING_EMPTIED)
    for overwrite in ("sft", "sft,controls", True):
        config = PipelineConfig(stage=Stage.all, run_dir=str(tmp_path), overwrite=overwrite)
        rebuilding.check(config, (*STAGES, Stage.controls))


def test_damaged_and_missing_records_belong_to_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(monkeypatch, "mine")
    (tmp_path / "artifact.json").write_text('{"launch": "mine", ')
    assert not launches.has_written(tmp_path / "artifact.json")
    assert not launches.has_written(tmp_path / "unfinished.json")


@pytest.mark.parametrize("overwrite", [True, False])
def test_processes_agree_on_their_launch_before_they_read_the_run(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(launches, "agree", lambda: seen.append("agreed"))

    def find_ahead(config: PipelineConfig, is_launched_well: bool) -> list[str]:
        Run(config)
        seen.append("read")
        return ["a problem"]

    with pytest.raises(UserError, match="a problem"):
        job.run_job(PipelineConfig(stage=Stage.sft, run_dir=str(tmp_path), overwrite=overwrite), find_ahead)
    assert seen == (["agreed", "read"] if overwrite else ["read"])
