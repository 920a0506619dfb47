"""serve: start an engine on the proven export, ask it one question, and keep it running until Ctrl-C.

The stage runs until it is stopped. It writes the engine's command and log, but no artifact.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import PipelineConfig, ServeConfig, Stage
from pipeline.config.engines import SERVERS
from pipeline.errors import UserError
from pipeline.runs import exports, passing_over
from pipeline.runs.artifacts import Artifact
from pipeline.runs.console import say, warn
from pipeline.runs.processes import process_count
from pipeline.runs.records import ExportRecord
from pipeline.runs.run import Run

if TYPE_CHECKING:
    from pipeline.evaluate.transcripts import Parsed
    from pipeline.serve.launch import Launch
    from pipeline.serve.process import EngineProcess


def run(config: PipelineConfig) -> Artifact:
    """Serve the export of export.target and return its artifact.

    Raises:
        UserError: the export is unfinished or has not passed stage=verify, a later model has begun since, or `plan`
            refuses it.
        CheckFailed: the engine crashed, did not come up, or did not answer.
        KeyboardInterrupt: Ctrl-C before the engine had answered. Afterwards, Ctrl-C is the regular end.
    """
    if process_count() > 1:
        raise UserError("stage=serve: the engine must be started from a single process. Run it without a launcher.")
    here = Run(config)
    export = exports.require(here)
    passing_over.raise_if_export_is_older(here, export)
    launch = _launch(here, config, export)
    if config.serve.dry_run:
        print(launch.shell_line)
    else:
        _serve(config, here, launch)
    return export


def _launch(here: Run, config: PipelineConfig, export: Artifact) -> "Launch":
    import torch

    from pipeline.serve.launch import plan

    settings, found = config.serve, []
    if settings.verified_only and exports.find_proof(here, export) is None:
        found = [f"{exports.missing_proof(here, export)}, or serve it as it is: serve.verified_only=false"]
    date, gpus = config.data.conversation_date, torch.cuda.device_count()
    launch = plan(settings, export, name=here.recipe, date=date, gpus=gpus, found=found)
    _tell_of_old_version(settings, export, launch.command[0])
    return launch


def _tell_of_old_version(settings: ServeConfig, export: Artifact, command: str) -> None:
    from pipeline.serve import versions

    program, target = shutil.which(command), export.read(ExportRecord).target
    if program is not None:
        problem = versions.describe_problem(Path(program), SERVERS[settings.engine.name], target)
        if problem is not None:
            warn("serve", problem)


def _serve(config: PipelineConfig, here: Run, launch: "Launch") -> None:
    from pipeline.evaluate.generation.replies import NoAnswerError
    from pipeline.serve import client
    from pipeline.serve.process import EngineProcess, interrupt_on_signals

    name, log = config.serve.engine.name, _write_command(here, config.serve.port, launch)
    with interrupt_on_signals(), EngineProcess(name, launch.command, log, launch.environment) as engine:
        say("serve", f"{name} is starting; its log: {log}")
        engine.wait_until(lambda: client.is_up(launch.health), config.serve.startup_seconds)
        try:
            model = client.model_name(launch.api, config.serve.answer_seconds)
            answer = client.ask(launch.api, model, config.serve, config.data)
        except NoAnswerError as error:
            raise engine.failure(f"was up, but did not answer: {error}") from error
        _show(config.serve.question, client.channels(answer), answer.finish)
        if not config.serve.once:
            _until_interrupted(engine, f"{launch.api} serves {model!r}. Ctrl-C ends it")
    say("serve", f"{name} has ended")


def _write_command(here: Run, port: int, launch: "Launch") -> Path:
    """Write the engine's command, and return the path of its log.

    Both names contain the port, because several engines may run at a time.
    """
    directory = here.stage_dir(Stage.serve)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        command = directory / f"command-{port}.sh"
        command.touch(mode=0o600)  # its arguments may have a key of the user
        command.chmod(0o600)
        command.write_text(f"#!/bin/sh\nexec {launch.shell_line}\n", encoding="utf-8")
    except OSError as error:
        raise here.not_writable(directory, error) from error
    return directory / f"engine-{port}.log"


def _show(question: str, answer: "Parsed", finish: str) -> None:
    say("serve", f"question: {question}")
    if answer.reasoning is not None:
        say("serve", f"analysis: {answer.reasoning}")
    for call in answer.tool_calls:
        say("serve", f"calls {call['name']}: {call['arguments']}")
    say("serve", f"final: {answer.answer}" if answer.answer is not None else "final: none, the model wrote no answer")
    if finish == "length":
        say("serve", "The answer was cut off. To allow longer ones, raise serve.max_new_tokens.")


def _until_interrupted(engine: "EngineProcess", message: str) -> None:
    try:
        say("serve", message)  # inside `try`, because Ctrl-C may follow at once
        engine.wait()
    except KeyboardInterrupt:
        say("serve", "ending the engine")
