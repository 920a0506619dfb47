"""doctor: reports what the data contain, what the run needs, whether it fits here, and what may harm training."""

from pathlib import Path
from typing import Any

import xxhash

from pipeline.checkpoints import largest_codes
from pipeline.checkpoints.config_json import is_quantized, read_config
from pipeline.checkpoints.largest_codes import CodeFigures
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import side_files
from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import Control, controls_of
from pipeline.data.examples import rendering_of, split_rows
from pipeline.data.harmony import Rendering
from pipeline.data.languages import Languages
from pipeline.data.rows import Rows, load_rows
from pipeline.data.sources import data_sources
from pipeline.data.tokenizers import load_tokenizer
from pipeline.doctor import (
    content,
    controls,
    device_memory,
    display,
    findings,
    leaks,
    machine,
    needs,
    parity,
    renderings,
)
from pipeline.doctor.findings import DataFigures, Facts
from pipeline.doctor.plan import Plan
from pipeline.doctor.rows import examine
from pipeline.doctor.rows import figures as token_figures
from pipeline.errors import UserError
from pipeline.models import source
from pipeline.runs import up_to_date
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.console import say
from pipeline.runs.processes import is_main_process, process_count
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

_SETTINGS = (
    "data",
    "model.path",
    "model.revision",
    "upcast.experts",
    "sft",
    "format",
    "quantize.source",
    "quantize.method",
    "quantize.scales",
    "quantize.calibration_samples",
    "quantize.tokens_per_input",
    "qat",
    "sharding",
    "export.target",
    "controls",
    "doctor.languages",
)


def run(config: PipelineConfig) -> Artifact:
    """Write the report to <run_dir>/doctor, and print one conversation and the report. No model weights are needed."""
    here, tell = Run(config), Languages(config.doctor.languages, "doctor.languages")
    model = source.locate_without_weights(here, config.model)
    how = rendering_of(config.data, load_tokenizer(model))
    rows = load_rows(here, config.data, lists_unused=False)  # the report lists them
    _raise_if_no_such_row(config, rows)
    weights = _open_weights(model)
    artifact = build(
        here,
        Stage.doctor,
        settings=_SETTINGS,
        parents={
            "tokenizer": _fingerprint(model),
            "processes": str(process_count()),
            "unused": xxhash.xxh3_128_hexdigest(repr(rows.unused).encode()),
            **({"weights": source.sampled_fingerprint(model)} if weights else {}),
        },
        work=lambda directory: _report(
            here, _plan(config), model, _data_figures(config, rows, how, tell), _codes(weights), directory
        ),
        data=rows.fingerprint,
        is_report=True,
    )
    if is_main_process():
        # Free memory and disk space change all the time, so they are measured even if the report is up to date.
        free = machine.figures(here.directory)
        facts = Facts.of(artifact.read(DoctorRecord), free, _plan(config), read_config(model), here)
        found = findings.findings(facts)
        if up_to_date.is_summarized(Stage.doctor.name):
            display.warnings(found)
            return artifact
        display.conversation(config.doctor.row, rows.conversations[config.doctor.row - 1], how)
        display.report(facts, found)
    return artifact


def _plan(config: PipelineConfig) -> Plan:
    return Plan(
        config.model.path,
        config.data,
        config.sft,
        config.qat,
        config.sharding,
        config.export.target.name,
        config.format,
        config.quantize,
        config.upcast.experts,
    )


def _report(
    here: Run, plan: Plan, model: Path, figures: DataFigures, codes: CodeFigures | None, directory: Path
) -> Result:
    longest = min(figures["lengths"]["longest"], plan.data.max_length)
    shapes = read_config(model)
    devices = device_memory.figures(plan, shapes, longest, process_count())
    needed = needs.figures(plan, shapes, longest, devices)
    if here.config.controls:
        needed["controls"] = {
            control.name: controls.figures(_plan(control.config), control.stages, shapes, longest, process_count())
            for control in _controls(here, plan, is_mxfp4=is_quantized(shapes))
        }
    facts = Facts(figures, needed, machine.figures(here.directory), plan, shapes, here, codes)
    sections: dict[str, Any] = {**facts.data, "needs": facts.needs, "machine": facts.machine}
    sections |= {"largest_codes": codes} if codes else {}
    for section, values in sections.items():
        log_metrics(directory, {"section": section, **values})
    found = findings.findings(facts)
    record = DoctorRecord(
        data=dict(facts.data),
        needs=dict(facts.needs),
        machine=dict(facts.machine),
        findings=found,
        largest_codes=codes,
    )
    return Result(Kind.report, record)


def _controls(here: Run, plan: Plan, *, is_mxfp4: bool) -> list[Control]:
    has_mxfp4 = is_mxfp4 or plan.starts_packed(is_mxfp4=is_mxfp4)
    return controls_of(here.config, str(here.directory / Stage.sft.name), has_mxfp4=has_mxfp4)


def _data_figures(config: PipelineConfig, rows: Rows, how: Rendering, tell: Languages) -> DataFigures:
    train, validation = (examine(part, how, config.data.max_length) for part in split_rows(config.data, rows))
    every = [*train, *validation]
    figures: DataFigures = {
        "rows": {"all": len(rows.conversations), "train": len(train), "validation": len(validation)},
        **token_figures(every, config.data.max_length),
        "reasoning": content.reasoning(every, how),
        "reasoning_effort": content.efforts(every, how.reasoning_effort),
        "tools": content.tools(every),
        "control_text": content.control_text(every),
        "copies": content.copies(every),
        "leaks": leaks.figures(train, validation),
        "languages": content.languages(every, tell, how),
        "parity": parity.figures(every, how),
        "untrained": content.untrained(every),
        "rendering": renderings.figures(every, how),
        "unused": {
            "warnings": [line for unused in rows.unused for line in unused.warnings()],
            "remarks": [line for unused in rows.unused for line in unused.remarks()],
        },
    }
    if rows.validation:
        *_, source = data_sources(config.data)
        limit = config.data.max_length
        own = token_figures(validation, limit)
        figures["validation"] = {
            "source": f"{source.data.path} ({source.data.split})",
            "rows": len(validation),
            "tokens": own["tokens"],
            "lengths": own["lengths"],
            "cut": own["cut"],
        }
    return figures


def _open_weights(model: Path) -> Checkpoint | None:
    """Open the base model's weights. Return None if they are not MXFP4, or are not complete on this machine.

    A download may be unfinished. `upcast` reports files that are missing or damaged.
    """
    if not any(model.glob("*.safetensors")):
        return None
    try:
        found = Checkpoint(model)
    except UserError as error:
        say("doctor", f"the base model's blocks are not counted, because its weights are not complete: {error}")
        return None
    return found if found.is_packed else None


def _codes(weights: Checkpoint | None) -> CodeFigures | None:
    return None if weights is None else largest_codes.sample(weights)


def _raise_if_no_such_row(config: PipelineConfig, rows: Rows) -> None:
    if config.doctor.row > len(rows.conversations):
        raise UserError(
            f"doctor.row={config.doctor.row}: data.path={config.data.path} has {len(rows.conversations)} rows"
            f"{', with those of data.validation' if rows.validation else ''}."
        )


def _fingerprint(model: Path) -> str:
    """Return a fingerprint of config.json, the tokenizer and the chat template. The report depends on these files."""
    digest = xxhash.xxh3_128()
    for name in ("config.json", *(name for name in side_files(model) if name.endswith((".json", ".jinja")))):
        digest.update(f"{name}\0".encode() + (model / name).read_bytes())
    return digest.hexdigest()
