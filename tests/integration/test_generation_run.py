"""Answers in a whole run: models and servers answer, a killed evaluation resumes, and training writes samples."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import forks
import pytest
from chat_server import GOOD, Reply, Server
from conftest import ONE_LAYER, SHORT, linked, run_program
from run_files import results

from pipeline.runs import artifacts

QUICK = ("eval=quick", "evaluate.prompts.max_samples=4", "evaluate.generation.max_new_tokens=12")
CHAT = "evaluate.endpoint.api=chat"
KEY = "sk-secret-7"


@pytest.fixture
def unmeasured(run_dir: Path) -> Path:
    """A copy of the smoke run without its evaluation."""
    shutil.rmtree(run_dir / "evaluate")
    return run_dir


def evaluate(run_dir: Path, *arguments: str) -> int:
    return run_program("stage=evaluate", "recipe=smoke", f"run_dir={run_dir}", *SHORT, *arguments)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answers(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return lines(run_dir / "evaluate" / name / "generations.jsonl")


def test_by_default_no_answers_are_generated(smoke_run: Path) -> None:
    assert not list(smoke_run.rglob("generations.jsonl")) and not list(smoke_run.rglob("samples.jsonl"))


def test_every_model_of_the_run_answers_the_same_prompts(run_dir: Path, smoke_run: Path) -> None:
    assert evaluate(run_dir, *QUICK, "evaluate.source=all") == 0
    asked = [{line["prompt_id"] for line in answers(run_dir, name)} for name in ("upcast", "sft", "qat", "export")]
    assert asked == [asked[0]] * 4 and len(asked[0]) == 4
    assert all(line["tokens"] <= 12 for line in answers(run_dir, "sft"))
    for name, before in results(smoke_run).items():
        assert before.items() <= results(run_dir)[name].items()  # answers do not change the other figures


def test_prompts_by_another_path_are_not_asked_again(
    unmeasured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"messages": [{"role": "user", "content": "3 + 4?"}]}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert evaluate(unmeasured, *QUICK, "evaluate.source=sft", f"evaluate.prompts.path={questions.name}") == 0
    measured = (unmeasured / "evaluate" / "sft.json").stat().st_ino
    monkeypatch.chdir("elsewhere")
    assert evaluate(unmeasured, *QUICK, "evaluate.source=sft", f"evaluate.prompts.path={questions}") == 0
    assert "[evaluate] up to date" in capsys.readouterr().out
    assert evaluate(unmeasured, *QUICK, "evaluate.source=upcast", f"evaluate.prompts.path={questions}") == 0
    assert results(unmeasured).keys() == {"sft", "upcast"}
    assert (unmeasured / "evaluate" / "sft.json").stat().st_ino == measured


def test_the_export_gives_the_same_answers_as_its_source(run_dir: Path) -> None:
    arguments = (*QUICK, "evaluate.generation.temperature=1", "evaluate.generation.samples=2", "model.dtype=bfloat16")
    assert evaluate(run_dir, *arguments, "evaluate.source=all") == 0
    assert len(answers(run_dir, "qat")) == 8
    assert answers(run_dir, "export") == answers(run_dir, "qat") != answers(run_dir, "sft")


def test_a_killed_evaluation_resumes_and_ends_with_the_same_answers(unmeasured: Path) -> None:
    run_dir = unmeasured
    arguments = (*QUICK, "evaluate.source=sft", "evaluate.generation.batch_size=1", "evaluate.prompts.max_samples=8")
    whole = shutil.copytree(run_dir, run_dir.with_name("whole"), symlinks=True)
    assert evaluate(whole, *arguments) == 0
    path = run_dir / "evaluate" / "sft" / "generations.jsonl"
    command = ["-m", "pipeline", "stage=evaluate", "recipe=smoke", f"run_dir={run_dir}", *SHORT, *arguments]
    process = subprocess.Popen([*forks.interpreter(), *command], stdout=subprocess.PIPE)
    while process.poll() is None and not (path.is_file() and path.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # the output ends when the fork ends, which has it too
    assert process.returncode == -signal.SIGKILL
    kept = path.read_bytes()
    assert 0 < len(kept) < len((whole / "evaluate" / "sft" / "generations.jsonl").read_bytes())
    assert not (run_dir / "evaluate" / artifacts.ARTIFACT_FILE).is_file()
    assert evaluate(run_dir, *arguments) == 0
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert answers(run_dir, "sft") == answers(whole, "sft")


def test_results_from_before_an_interruption_are_kept(unmeasured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as gone:
        arguments = ("evaluate.source=upcast", f"evaluate.endpoint.url={gone.url}", CHAT)
        assert evaluate(unmeasured, *QUICK, *arguments) == 0
    with monkeypatch.context() as interrupted:
        interrupted.setattr("pipeline.evaluate.generation.local.Local.answer", stop)
        assert evaluate(unmeasured, *QUICK, "evaluate.source=sft") == 130
    assert evaluate(unmeasured, *QUICK, "evaluate.source=sft") == 0
    assert set(results(unmeasured)) == {"upcast", "endpoint", "sft"}


def test_changed_settings_ask_again_and_unchanged_ones_are_up_to_date(
    unmeasured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = unmeasured
    assert evaluate(run_dir, *QUICK, "evaluate.source=sft") == 0
    capsys.readouterr()
    assert evaluate(run_dir, *QUICK, "evaluate.source=sft") == 0
    assert "up to date" in capsys.readouterr().out
    assert evaluate(run_dir, *QUICK, "evaluate.source=sft", "evaluate.generation.max_new_tokens=5") == 0
    out = capsys.readouterr().out
    assert "again, because evaluate.generation.max_new_tokens changed from 12 to 5" in out
    assert all(line["tokens"] <= 5 for line in answers(run_dir, "sft"))


# --- a server --------------------------------------------------------------------------------------------------------


def test_a_server_is_evaluated_alone_and_added_to_the_results(
    run_dir: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    where = (f"evaluate.endpoint.url={server.url}", CHAT, "evaluate.endpoint.name=vllm")
    assert evaluate(run_dir, *QUICK, *where, "evaluate.endpoint.api_key_env=MY_KEY") == 0
    assert len(answers(run_dir, "vllm")) == 4
    assert set(results(run_dir)) == {"upcast", "sft", "quantize", "qat", "export", "vllm"}
    assert not [path for path in run_dir.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    capsys.readouterr()
    assert run_program("stage=compare", "recipe=smoke", f"run_dir={run_dir}", *SHORT) == 0
    assert re.search("│ vllm +│ +– │ +– │ +– │", capsys.readouterr().out)


def test_the_results_of_a_stopped_server_are_kept_until_something_changes(
    unmeasured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = unmeasured
    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as gone:
        assert evaluate(run_dir, *QUICK, f"evaluate.endpoint.url={gone.url}", CHAT) == 0
    assert evaluate(run_dir, *QUICK, "evaluate.source=sft") == 0
    assert "endpoint" in results(run_dir)
    assert evaluate(run_dir, *QUICK, "evaluate.source=sft", "evaluate.generation.max_new_tokens=5") == 0
    assert "endpoint: skipped, because it was measured with other settings" in capsys.readouterr().out
    assert "endpoint" not in results(run_dir)


def test_more_prompts_ask_a_server_only_for_the_new_ones(tmp_path: Path, server: Server) -> None:
    run_dir = tmp_path / "run"
    arguments = (*QUICK, f"evaluate.endpoint.url={server.url}", CHAT, "evaluate.endpoint.model=tiny")
    assert evaluate(run_dir, *arguments) == 0
    assert evaluate(run_dir, *arguments, "evaluate.prompts.max_samples=6") == 0
    assert len(server.asked) == 6


def test_a_server_can_be_measured_without_a_model_of_the_run(tmp_path: Path, server: Server) -> None:
    assert evaluate(tmp_path / "run", *QUICK, f"evaluate.endpoint.url={server.url}", CHAT) == 0
    assert list(results(tmp_path / "run")) == ["endpoint"]
    assert run_program("stage=compare", "recipe=smoke", f"run_dir={tmp_path / 'run'}", *SHORT) == 0


def test_a_server_that_fails_midway_is_a_user_error_and_the_next_run_continues(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = (*QUICK, f"evaluate.endpoint.url={server.url}", CHAT, "evaluate.endpoint.concurrency=1")
    server.replies = [GOOD, Reply("<html>")]
    assert evaluate(run_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: evaluate.endpoint.url={server.url}: the answer to synthetic://arithmetic: row ")
    assert error.count("\n") == 1
    server.replies, server.asked = [GOOD], []
    assert evaluate(run_dir, *arguments) == 0
    assert sum(path.endswith("/chat/completions") for path, _, _ in server.asked) == 3


def test_a_server_that_is_down_stops_before_models_are_evaluated(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = results(run_dir)
    arguments = ("evaluate.source=all", "evaluate.endpoint.url=http://127.0.0.1:9/v1", "evaluate.endpoint.retries=0")
    assert evaluate(run_dir, *QUICK, *arguments) == 2
    captured = capsys.readouterr()
    assert "the server's list of models did not come in 1 attempts" in captured.err
    assert "[evaluate]" not in captured.out
    assert results(run_dir) == before


# --- during training -------------------------------------------------------------------------------------------------

EARLY = ("evaluate.during_training.prompts=2", "evaluate.during_training.max_new_tokens=6")


def train(run_dir: Path, recipe: str, stages: tuple[str, ...], *arguments: str) -> None:
    for stage in stages:
        assert run_program(f"stage={stage}", f"recipe={recipe}", f"run_dir={run_dir}", *SHORT, *arguments) == 0


def test_samples_are_written_at_each_validation_and_change_nothing(smoke_run: Path, tmp_path: Path) -> None:
    train(linked(tmp_path / "run", smoke_run, "upcast"), "smoke", ("sft", "quantize", "qat"), *EARLY)
    for stage, steps in (("sft", [0, 6, 12]), ("qat", [0, 3, 6])):
        samples = lines(tmp_path / "run" / stage / "samples.jsonl")
        assert [line["step"] for line in samples] == [step for step in steps for _ in range(2)]
        assert all(line["prompt"].startswith(("What is", "And")) and line["tokens"] <= 6 for line in samples)
        made, before = (artifacts.load(run / stage) for run in (tmp_path / "run", smoke_run))
        assert made.fingerprint == before.fingerprint
        figures = [
            [{k: v for k, v in line.items() if k.startswith(("eval_", "router_"))} for line in lines(path)]
            for path in (run / stage / "metrics.jsonl" for run in (tmp_path / "run", smoke_run))
        ]
        assert figures[0] == figures[1]
    assert not (tmp_path / "run" / "quantize" / "samples.jsonl").exists()


def test_a_model_with_adapters_writes_samples_too(lora_run: Path, tmp_path: Path) -> None:
    train(linked(tmp_path / "run", lora_run, "upcast"), "smoke_lora", ("sft",), *EARLY, *ONE_LAYER)
    assert len(lines(tmp_path / "run" / "sft" / "samples.jsonl")) == 6
    made, before = (run / "sft" / "adapter_model.safetensors" for run in (tmp_path / "run", lora_run))
    assert made.read_bytes() == before.read_bytes()
