"""doctor: what is in the data, what the run will need, whether it fits here, and what of it will hurt training."""

from pathlib import Path
from typing import Any

import xxhash

from pipeline import artifacts, data, source
from pipeline.artifacts import Artifact, Kind, Result
from pipeline.checkpoints import load_tokenizer, read_config, side_files
from pipeline.config import PipelineConfig, Stage
from pipeline.data import Rows
from pipeline.doctor import content, display, findings, leaks, machine, needs, parity
from pipeline.doctor.findings import Facts
from pipeline.doctor.rows import examine
from pipeline.doctor.rows import figures as token_figures
from pipeline.errors import UserError
from pipeline.languages import Languages
from pipeline.tracking import is_main_process, log_metrics

_SETTINGS = ("data", "model.path", "model.revision", "sft", "qat", "doctor.languages")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/doctor, and show it with one conversation. Of the model only its tokenizer and sizes are used."""
    model = source.without_weights(config)
    rows = data.load_rows(config)
    _raise_if_no_such_row(config, rows)
    artifact = artifacts.build(
        config,
        Stage.doctor,
        _SETTINGS,
        {"tokenizer": _fingerprint(model)},
        lambda directory: _examine(config, model, rows, directory),
        data=rows.fingerprint,
        is_report=True,
    )
    if is_main_process():
        report = artifact.details
        # What is free changes from one minute to the next, so it is looked at even when the report is up to date.
        facts = Facts(report["data"], report["needs"], machine.figures(config), config)
        how = data.rendering(config, load_tokenizer(model))
        display.conversation(config.doctor.row, rows.conversations[config.doctor.row - 1], how)
        display.report(facts, findings.findings(facts))
    return artifact


def _examine(config: PipelineConfig, model: Path, rows: Rows, directory: Path) -> Result:
    figures = _data_figures(config, model, rows)
    longest = min(figures["lengths"]["longest"], config.data.max_length)
    facts = Facts(figures, needs.figures(config, read_config(model), longest), machine.figures(config), config)
    report: dict[str, Any] = {
        "data": facts.data,
        "needs": facts.needs,
        "machine": facts.machine,
        "findings": findings.findings(facts),
    }
    for section in ("needs", "machine"):
        log_metrics(directory, {"section": section, **report[section]})
    for name, value in figures.items():
        log_metrics(directory, {"section": name, **(value if isinstance(value, dict) else {name: value})})
    return Result(Kind.report, details=report)


def _data_figures(config: PipelineConfig, model: Path, rows: Rows) -> dict[str, Any]:
    tell = Languages(config.doctor.languages, "doctor.languages")
    how = data.rendering(config, load_tokenizer(model))
    train, validation = (examine(config, part, how) for part in data.split(config, rows))
    every = [*train, *validation]
    return {
        "rows": {"all": len(rows.conversations), "train": len(train), "validation": len(validation)},
        **token_figures(every, config.data.max_length),
        "reasoning": content.reasoning(every),
        "reasoning_effort": content.efforts(every, how.reasoning_effort),
        "tools": content.tools(every),
        "control_text": content.control_text(every),
        "copies": content.copies(every),
        "leaks": leaks.figures(train, validation),
        "languages": content.languages(every, tell),
        "parity": parity.figures(every, how),
    }


def _raise_if_no_such_row(config: PipelineConfig, rows: Rows) -> None:
    if config.doctor.row > len(rows.conversations):
        raise UserError(
            f"doctor.row={config.doctor.row}: data.path={config.data.path} has {len(rows.conversations)} rows."
        )


def _fingerprint(model: Path) -> str:
    """Of what goes into the report: the sizes in config.json, the tokenizer, the chat template."""
    digest = xxhash.xxh3_128()
    for name in ("config.json", *(name for name in side_files(model) if name.endswith((".json", ".jinja")))):
        digest.update(f"{name}\0".encode() + (model / name).read_bytes())
    return digest.hexdigest()
