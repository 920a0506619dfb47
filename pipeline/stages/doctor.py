"""doctor: reports what the data contain, what the run needs, whether it fits here, and what may harm training."""

from pathlib import Path
from typing import Any

import xxhash

from pipeline.checkpoints import largest_codes, soundness
from pipeline.checkpoints.config_json import read_model
from pipeline.checkpoints.largest_codes import CodeFigures
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import side_files
from pipeline.config import PipelineConfig, Stage
from pipeline.config.gpus import GPUS, GpuModel
from pipeline.data.examples import rendering_of, split_rows
from pipeline.data.harmony import Rendering
from pipeline.data.languages import Languages
from pipeline.data.rows import Rows, load_rows
from pipeline.data.sources import data_sources
from pipeline.data.tokenizers import load_tokenizer
from pipeline.doctor import content, display, findings, leaks, machine, parity, prediction, renderings, timetable
from pipeline.doctor.facts import DataFigures, Facts
from pipeline.doctor.plan import Plan
from pipeline.doctor.rows import examine
from pipeline.doctor.rows import figures as token_figures
from pipeline.errors import UserError
from pipeline.evaluate.generation import prompts
from pipeline.models import foreign_sft, source
from pipeline.runs import gpus, up_to_date
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
    config = config.with_target()
    here, tell = Run(config), Languages(config.doctor.languages, "doctor.languages")
    model = source.locate_without_weights(here, config.model)
    foreign_sft.check(here, model)
    how = rendering_of(config.data, load_tokenizer(model))
    rows = load_rows(here, config.data, lists_unused=False)  # the report lists them
    _raise_if_no_such_row(config, rows)
    weights = _open_weights(model)

    found: list[str] = []  # to find remedies takes time, so a new report and its display share the findings

    def write(directory: Path) -> Result:
        figures, shapes = _data_figures(config, rows, how, tell), read_model(model)
        free = machine.figures(here.directory, _planned(config))
        longest, on_gpu = figures["lengths"]["longest"], free["gpus"] > 0
        needed = prediction.needs_of(config, shapes, longest, process_count(), on_gpu=on_gpu)
        facts = Facts(figures, needed, free, Plan.of(config), shapes, here, _look_at(weights))
        found.extend(findings.findings(facts))
        return _report(facts, found, directory)

    artifact = build(
        here,
        Stage.doctor,
        settings=_SETTINGS,
        parents=_parents(config, model, rows, has_weights=weights is not None),
        work=write,
        data=rows.fingerprint,
        is_report=True,
    )
    if is_main_process():
        # Free memory and disk space change all the time, so they are measured even if the report is up to date.
        free = machine.figures(here.directory, _planned(config))
        facts = Facts.of(artifact.read(DoctorRecord), free, Plan.of(config), read_model(model), here)
        _show(facts, rows, how, found or findings.findings(facts))
    return artifact


def _parents(config: PipelineConfig, model: Path, rows: Rows, *, has_weights: bool) -> dict[str, str]:
    """Return everything that the report depends on, besides its settings and the data."""
    return {
        "tokenizer": _fingerprint(model),
        "processes": str(process_count()),
        "device": "GPU" if gpus.visible() or _planned(config) else "CPU",
        "figures": ", ".join(DataFigures.__annotations__),  # earlier reports may lack some of them
        "unused": xxhash.xxh3_128_hexdigest(repr(rows.unused).encode()),
        **({"weights": source.sampled_fingerprint(model)} if has_weights else {}),
    }


def _show(facts: Facts, rows: Rows, how: Rendering, found: list[str]) -> None:
    if up_to_date.is_summarized(Stage.doctor.name):
        display.warnings(found)
        return
    row = facts.run.config.doctor.row
    display.conversation(row, rows.conversations[row - 1], how)
    display.report(facts, _timetable(facts, rows), found)


def _planned(config: PipelineConfig) -> GpuModel | None:
    return None if config.doctor.gpu is None else GPUS[config.doctor.gpu.name]


def _timetable(facts: Facts, rows: Rows) -> list[tuple[str, str]]:
    config, visible = facts.run.config, gpus.visible()
    speed = timetable.speed_of(config.doctor.gpu and config.doctor.gpu.name, visible)
    if speed is None:
        return [("time", timetable.unknown_gpu(visible[0].name))]
    evaluate = config.evaluate
    asked = prompts.load(facts.run, config.data, evaluate.prompts, rows) if evaluate.generate else []
    return list(timetable.of_run(facts, speed, len(asked)).lines())


def _report(facts: Facts, found: list[str], directory: Path) -> Result:
    sections: dict[str, Any] = {**facts.data, "needs": facts.needs, "machine": facts.machine}
    sections |= {"largest_codes": facts.largest_codes} if facts.largest_codes else {}
    for section, values in sections.items():
        log_metrics(directory, {"section": section, **values})
    record = DoctorRecord(
        data=dict(facts.data),
        needs=dict(facts.needs),
        machine=dict(facts.machine),
        findings=found,
        largest_codes=facts.largest_codes,
    )
    return Result(Kind.report, record)


def _data_figures(config: PipelineConfig, rows: Rows, how: Rendering, tell: Languages) -> DataFigures:
    train, validation = (examine(part, how, config.data.max_length) for part in split_rows(config.data, rows))
    every = [*train, *validation]
    figures: DataFigures = {
        "rows": {"all": len(rows.conversations), "train": len(train), "validation": len(validation)},
        **token_figures(every, config.data.max_length),
        "reasoning": content.reasoning(every, how),
        "reasoning_effort": content.efforts(every, how.reasoning_effort),
        "tools": content.tools(every),
        "unoffered": content.unoffered(every),
        "empty_answers": content.empty_answers(every),
        "unanswered": content.unanswered(every),
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
    """Open the base model's weights. Return None if they are not complete on this machine.

    A download may be unfinished. `upcast` reports files that are missing or damaged.
    """
    if not any(model.glob("*.safetensors")):
        return None
    try:
        return Checkpoint(model)
    except UserError as error:
        say("doctor", f"the base model's blocks are not counted, because its weights are not complete: {error}")
        return None


def _look_at(weights: Checkpoint | None) -> CodeFigures | None:
    """Look for NaN and Inf in a sample of the base model's weights, and count the MXFP4 blocks of another sample."""
    if weights is None:
        return None
    soundness.raise_if_sample_bad(weights)
    values = f"{soundness.SAMPLED_VALUES:,} values of each tensor"
    say("doctor", f"no NaN or Inf in a sample of the weights (the first {values}); stage=upcast checks every byte")
    return largest_codes.sample(weights) if weights.is_packed else None


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
