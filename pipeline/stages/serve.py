"""serve: starts an engine on the proven export, asks it one question, and keeps it running until Ctrl-C.

It leaves no artifact, only the engine's command and log.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.runs import artifacts, proofs
from pipeline.runs.artifacts import Artifact
from pipeline.runs.console import say
from pipeline.runs.processes import process_count

if TYPE_CHECKING:
    from pipeline.evaluate.transcripts import Parsed
    from pipeline.serve.launch import Launch
    from pipeline.serve.process import EngineProcess


def run(config: PipelineConfig) -> Artifact:
    """Serve <run_dir>/export, and return its artifact.

    Raises:
        UserError: the export is unfinished or not proven, or `plan` raises one.
        CheckFailed: the engine crashed, did not start, or did not answer.
        KeyboardInterrupt: Ctrl-C before the engine has answered. Afterwards Ctrl-C ends the stage normally.
    """
    if process_count() > 1:
        raise UserError("stage=serve: starts its engine from one process. Run it without a launcher.")
    export = artifacts.require(config, Stage.export)
    launch = _launch(config, export)
    if config.serve.dry_run:
        print(launch.shell_line)
    else:
        _serve(config, launch)
    return export


def _launch(config: PipelineConfig, export: Artifact) -> "Launch":
    import torch

    from pipeline.serve.launch import plan

    found = []
    if config.serve.verified_only and proofs.proof_of(config, export) is None:
        found = [f"{proofs.missing_proof(config, export)}, or serve it as it is: serve.verified_only=false"]
    return plan(config, export, torch.cuda.device_count(), found)


def _serve(config: PipelineConfig, launch: "Launch") -> None:
    from pipeline.serve import client
    from pipeline.serve.process import EngineProcess, ended_by_signals

    name, log = config.serve.engine.name, _log(config, launch)
    with ended_by_signals(), EngineProcess(name, launch.command, log) as engine:
        say("serve", f"{name} is starting; its log: {log}")
        engine.wait_until(lambda: client.is_up(launch.health), config.serve.startup_seconds)
        try:
            model = client.model_name(launch.api, config.serve.answer_seconds)
            answer = client.ask(launch.api, model, config)
        except client.NoAnswerError as error:
            raise engine.failed(f"was up, but did not answer: {error}") from error
        _show(config.serve.question, client.channels(answer), answer.finish)
        if not config.serve.once:
            _until_interrupted(engine, f"{launch.api} serves {model!r}. Ctrl-C ends it")
    say("serve", f"{name} has ended")


def _log(config: PipelineConfig, launch: "Launch") -> Path:
    """Path of the engine's log; writes its command beside it. The port is in both names: several engines may run."""
    directory, port = artifacts.stage_dir(config, Stage.serve.name), config.serve.port
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"command-{port}.sh").write_text(f"#!/bin/sh\nexec {launch.shell_line}\n", encoding="utf-8")
    except OSError as error:
        raise artifacts.not_writable(config, directory, error) from error
    return directory / f"engine-{port}.log"


def _show(question: str, answer: "Parsed", finish: str) -> None:
    say("serve", f"question: {question}")
    if answer.reasoning is not None:
        say("serve", f"analysis: {answer.reasoning}")
    for call in answer.tool_calls:
        say("serve", f"calls {call['name']}: {call['arguments']}")
    say("serve", f"final: {answer.answer}" if answer.answer is not None else "final: the answer never came")
    if finish == "length":
        say("serve", "cut off: it was longer than serve.max_new_tokens")


def _until_interrupted(engine: "EngineProcess", message: str) -> None:
    try:
        say("serve", message)  # from here on, Ctrl-C ends the stage normally
        engine.wait()
    except KeyboardInterrupt:
        say("serve", "ending the engine")
