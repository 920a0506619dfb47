"""The command line of each engine, and the checks before an engine starts.

An export may be served only if it has passed `verify`.
"""

import dataclasses
import os
import shlex
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from exports import EXPORTED, make_export, prove

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import ExportTarget, ModelConfig, PipelineConfig, ServeConfig, ServingEngine, Stage
from pipeline.config.engines import ENGINES, SERVERS
from pipeline.errors import CheckFailed, UserError
from pipeline.runs import provenance
from pipeline.runs.artifacts import Artifact
from pipeline.serve import launch
from pipeline.serve.launch import Launch
from pipeline.serve.process import EngineProcess, interrupt_on_signals
from pipeline.stages import serve as stage
from pipeline.stages.all import STAGES

GPT_OSS_20B = Shape(24, 2880, 2880, 32, 64, 8, 64, 201_088)


@pytest.fixture(autouse=True)
def without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the git commit out of artifacts, because asking git would slow down the tests."""
    monkeypatch.setattr(provenance, "_git_commit", lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    serve = ServeConfig(dry_run=True)
    return PipelineConfig(
        stage=Stage.serve, recipe="mine", run_dir=str(tmp_path / "run"), model=ModelConfig("base"), serve=serve
    )


@pytest.fixture
def export(config: PipelineConfig) -> Artifact:
    return make_export(config)


Refusal = Callable[..., str]


@pytest.fixture
def refusal(config: PipelineConfig, export: Artifact) -> Refusal:
    """A function that returns the error message for wrong settings of `serve`."""

    def message(gpus: int = 1, **settings: Any) -> str:
        for name, value in settings.items():
            setattr(config.serve, name, value)
        with pytest.raises(UserError) as caught:
            plan(config, export, gpus)
        return str(caught.value)

    return message


def plan(config: PipelineConfig, export: Artifact, gpus: int = 1) -> Launch:
    date = config.data.conversation_date
    return launch.plan(config.serve, export, name=config.recipe, date=date, gpus=gpus, found=[])


def words(config: PipelineConfig, export: Artifact, gpus: int = 1, **settings: Any) -> list[str]:
    config.serve = dataclasses.replace(config.serve, **settings)
    return plan(config, export, gpus).command


def test_the_stage_all_publishes_serves_and_makes_controls_only_on_demand() -> None:
    assert {*Stage} - {*STAGES} == {Stage.all, Stage.controls, Stage.publish, Stage.serve}


def test_the_table_has_a_row_for_every_engine_of_the_configuration() -> None:
    assert set(SERVERS) == {engine.name for engine in ServingEngine}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_read_targets_that_exist(name: str) -> None:
    assert set(ENGINES[name].targets) <= {target.name for target in ExportTarget}


@pytest.mark.parametrize("name", SERVERS)
def test_every_engine_has_flags_for_model_host_and_port(name: str) -> None:
    assert {"model", "host", "port"} <= set(SERVERS[name].flags)


def test_vllm_gets_the_directory_and_every_setting(config: PipelineConfig, export: Artifact) -> None:
    settings = {"context_length": 4096, "gpu_memory_fraction": 0.8, "extra_arguments": ["--max-num-seqs", "4"]}
    assert words(config, export, gpus=2, **settings) == [
        *("vllm", "serve", str(export.directory), "--served-model-name", "mine", "--host", "127.0.0.1"),
        *("--port", "8000", "--tensor-parallel-size", "2", "--max-model-len", "4096"),
        *("--gpu-memory-utilization", "0.8", "--enable-auto-tool-choice", "--tool-call-parser", "openai"),
        *("--max-num-seqs", "4"),
    ]


def test_vllm_writes_the_date_that_was_trained_unless_the_user_sets_another(
    config: PipelineConfig, export: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_SYSTEM_START_DATE", raising=False)
    config.data.conversation_date = "2025-09-01"
    started = plan(config, export)
    assert started.environment == {"VLLM_SYSTEM_START_DATE": "2025-09-01"}
    assert started.shell_line.startswith("env VLLM_SYSTEM_START_DATE=2025-09-01 vllm serve ")
    monkeypatch.setenv("VLLM_SYSTEM_START_DATE", "")  # vLLM then writes today's date
    assert plan(config, export).environment == {"VLLM_SYSTEM_START_DATE": ""}
    config.serve.engine = ServingEngine["sglang"]
    assert plan(config, export).shell_line.startswith("sglang serve ")


def test_settings_without_a_value_are_left_to_the_engine(config: PipelineConfig, export: Artifact) -> None:
    command = words(config, export, engine=ServingEngine["tensorrt_llm"])
    assert command == ["trtllm-serve", str(export.directory), "--host", "127.0.0.1", "--port", "8000", "--tp_size", "1"]


@pytest.mark.parametrize("engine", [ServingEngine["llama_cpp"], ServingEngine["llama_cpp_python"]])
def test_llama_cpp_gets_the_path_of_the_gguf_file(config: PipelineConfig, engine: ServingEngine) -> None:
    export = make_export(config, "gguf", {"model.gguf": "weights"})
    command = words(config, export, engine=engine, program="/opt/bin/it")
    assert command[0] == "/opt/bin/it"
    assert command[command.index("--model") + 1] == str(export.directory / "model.gguf")


def test_a_dry_run_prints_one_shell_line_with_the_quoted_command(
    config: PipelineConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config.run_dir = str(Path(config.run_dir).parent / "a run; with 'quotes'")
    prove(config, make_export(config))
    capsys.readouterr()
    export = stage.run(config)
    line = capsys.readouterr().out
    assert line.endswith("\n") and line.count("\n") == 1
    assert str(export.directory) in shlex.split(line)


def test_a_dry_run_starts_nothing_and_writes_nothing(config: PipelineConfig, export: Artifact) -> None:
    prove(config, export)
    stage.run(config)
    assert not (Path(config.run_dir) / "serve").exists()


@pytest.mark.parametrize(("gpus", "size"), [(0, 1), (1, 1), (2, 2), (3, 2), (6, 4), (8, 8), (16, 8)])
def test_the_parallel_size_is_the_largest_that_divides_heads_and_experts(gpus: int, size: int) -> None:
    assert launch.largest_parallel(GPT_OSS_20B, gpus) == size


def test_a_parallel_size_that_does_not_divide_is_refused_with_the_sizes(refusal: Refusal) -> None:
    message = refusal(gpus=3, tensor_parallel_size=3)
    assert message.startswith("serve.tensor_parallel_size=3: does not divide the model's 4 attention heads,")
    assert "Here 2 fits best" in message


def test_more_gpus_than_visible_are_refused_except_in_a_dry_run(
    refusal: Refusal, config: PipelineConfig, export: Artifact
) -> None:
    assert "--tensor-parallel-size" in words(config, export, gpus=0, tensor_parallel_size=2)
    assert "serve.tensor_parallel_size=2: 1 GPUs are visible here" in refusal(tensor_parallel_size=2, dry_run=False)


@pytest.mark.parametrize("target", ["gguf", "openai", "nvfp4"])
def test_an_engine_that_cannot_read_the_export_is_refused_with_an_engine_that_can(
    config: PipelineConfig, target: str
) -> None:
    export = make_export(config, target)
    with pytest.raises(UserError) as caught:
        plan(config, export)
    able = {
        "gguf": "llama_cpp or llama_cpp_python reads",
        "openai": "no engine here reads",
        "nvfp4": "tensorrt_llm reads",
    }
    assert "serve.engine=vllm: reads export.target=mxfp4, bf16" in str(caught.value)
    assert f"export.target={target}" in str(caught.value) and able[target] in str(caught.value)


def test_an_engine_that_can_read_another_export_of_the_run_is_refused_with_its_target(config: PipelineConfig) -> None:
    make_export(config, "mxfp4")
    config.export.target = ExportTarget["gguf"]
    with pytest.raises(UserError, match=r"The run also has export/mxfp4: add export\.target=mxfp4\. Or change"):
        plan(config, make_export(config, "gguf"))


def test_several_mistakes_are_reported_together(refusal: Refusal) -> None:
    message = refusal(
        engine=ServingEngine["llama_cpp"], context_length=1, tensor_parallel_size=2, gpu_memory_fraction=0.5
    )
    assert message.startswith("3 problems:")
    assert "serve.gpu_memory_fraction=0.5: serve.engine=llama_cpp has no such setting" in message


def test_a_missing_program_is_refused_with_the_command_that_installs_it(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    message = refusal(dry_run=False)
    assert message.startswith("serve.engine=vllm: the program 'vllm' was not found.") and "pip install vllm" in message
    assert refusal(program="/nowhere/vllm").startswith("serve.program=/nowhere/vllm: the program")


def test_a_path_of_a_program_becomes_absolute(
    config: PipelineConfig, export: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    for program, told in (("~/vllm", "/home/me/vllm"), ("bin/vllm", f"{tmp_path}/bin/vllm"), ("vllm-new", "vllm-new")):
        assert words(config, export, program=program)[0] == told


def test_a_port_in_use_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.touch()
    program.chmod(stat.S_IRWXU)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal(dry_run=False, program=str(program), port=port).startswith(
            f"serve.port={port}: another program listens"
        )


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("localhost", "localhost")])
def test_a_server_on_all_addresses_is_asked_over_the_local_one(
    config: PipelineConfig, export: Artifact, host: str, address: str
) -> None:
    config.serve.host = host
    planned = plan(config, export)
    assert planned.api == f"http://{address}:8000/v1"
    assert planned.health == f"http://{address}:8000/health"


# --- exports that may be served --------------------------------------------------------------------------------------


def test_an_export_that_verify_has_not_passed_is_refused(config: PipelineConfig, export: Artifact) -> None:
    with pytest.raises(UserError, match=r"has not passed stage=verify\. Run first: .*serve\.verified_only=false"):
        stage.run(config)
    config.serve.verified_only = False
    assert stage.run(config) == export


def test_a_proof_of_an_earlier_export_does_not_count(config: PipelineConfig, export: Artifact) -> None:
    prove(config, export)
    stage.run(config)
    config.overwrite = True
    make_export(config, files={**EXPORTED, "model.safetensors": "other weights"})
    with pytest.raises(UserError, match="has not passed stage=verify"):
        stage.run(config)


def test_an_unfinished_export_is_refused(config: PipelineConfig, export: Artifact) -> None:
    (export.directory / "artifact.json").unlink()
    with pytest.raises(UserError, match=r"stage=serve needs .*export/mxfp4, which is unfinished"):
        stage.run(config)


def test_serve_is_refused_under_a_distributed_launcher(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        stage.run(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_raise_keyboard_interrupt_while_an_engine_runs(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_an_engine_runs_without_handlers() -> None:
    """Python allows only the main thread to set handlers."""

    def run() -> bool:
        with interrupt_on_signals():
            return True

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(run).result()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_log_is_the_users_alone_and_an_error_shows_no_key_of_it(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.touch(mode=0o644)
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "--api-key", "mackerel"]
    with EngineProcess("vllm", command, log, {}) as engine, pytest.raises(CheckFailed) as raised:
        engine.wait()
    assert log.stat().st_mode & 0o777 == 0o600
    assert "mackerel" in log.read_text()
    assert "['--api-key', ***]" in str(raised.value)
    assert "mackerel" not in str(raised.value)


def test_an_engine_that_is_too_old_is_named_before_its_command(
    config: PipelineConfig, export: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prove(config, export)
    python, program = tmp_path / "python3", tmp_path / "vllm"
    python.write_text("#!/bin/sh\necho 0.9.2\n")
    program.write_text(f"#!{python}\n")
    for each in (python, program):
        each.chmod(0o755)
    config.serve.program = str(program)
    stage.run(config)
    printed = capsys.readouterr()
    assert "is version 0.9.2, which cannot load gpt-oss" in printed.err and " serve " in printed.out
