"""Make the rows of the report. Each row describes one model: its origin, its figures and its cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.gpt_oss import Shape, expert_projections, plain_tensors
from pipeline.compare.names import (
    EXPORT,
    MODELS,
    ORDER,
    PTQ,
    QAT,
    SFT,
    UPCAST,
    distinct_endings,
    is_local,
    without_directory,
)
from pipeline.compare.rounding import Rounding, find_rounding, find_twin
from pipeline.compare.runs import EvaluatedRun, StageFacts, has_answers
from pipeline.config.controls import is_control
from pipeline.config.pipeline import BF16_PARTS, MORE_SFT
from pipeline.errors import UserError
from pipeline.evaluate.generation.journal import read_answer
from pipeline.evaluate.scorers import VERDICTS
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict
from pipeline.numerics.formats import FORMATS, MXFP4
from pipeline.runs.artifacts import Kind, advise_rebuild
from pipeline.runs.exports import is_export
from pipeline.runs.json_files import Json
from pipeline.runs.records import EvaluateRecord, ExportRecord, QuantizeRecord, TrainingRecord, UpcastRecord

ANSWERS_FILE = "generations.jsonl"
_ROLES = {UPCAST: "original", SFT: "SFT", PTQ: "SFT + PTQ", QAT: "SFT + QAT"}
_FOREIGN_SFT = "SFT (adapters of another program)"
_BF16_BITS = 16
_LOSS = "validation_loss"
PATIENCE = "early_stopping_patience"
"""Setting of a training stage that may end it before its last step."""
_SCHEDULE = ("max_steps", "epochs", "batch_size", "gradient_accumulation_steps", PATIENCE)

Figures: TypeAlias = "Mapping[str, float | Mapping[str, float | Mapping[str, float]]]"
"""Figures of a model as `evaluate` stores them, by name.

Each figure is a value, a mapping of group -> value, or a mapping of group -> part -> value.
"""


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        run: the run that evaluated the model.
        model: name of the model in the results: a stage, a directory, or a model on a server.
        name: `model` with the label of its run, if there are several runs. compare.json uses it.
        title: name of the model for readers, such as "QAT". It is unique in the report.
        role: the steps from the original to the model ("SFT + PTQ"), or the model's name if the steps are unknown.
        block_format: 4-bit format of the experts' weights in the forward pass, or None.
        figures: values of the figures by name. If a value belongs to a group, its name ends in /<group>.
        fingerprint: fingerprint of the model.
        lineage: stage -> fingerprint, for the model and its ancestors. A control has the ancestors of the run's SFT
            model.
        seconds: duration of the stage that made the model, or None if it is unknown.
        peak_bytes: peak memory of the main process of that stage. It is GPU memory if the process has a GPU, else host
            memory. None if it is unknown.
        is_gpu_memory: whether `peak_bytes` is GPU memory.
        steps: number of optimizer steps of the stage that made the model. For the control more_sft, they are those of
            its SFT. None if the stage does not train, if it is unknown, or for the SFT model.
        schedule: the settings of that training that determine the number of steps, by name. Empty if `steps` is None.
        answers: the model's answers to the prompts; empty if there are none.
        verdicts: figure -> verdicts on the answers.
        rounding: how the experts were rounded, with the account of rounding, or None.
        twin: for an export, the fingerprint of the exported model, if its experts round to the export's values. None
            otherwise.
    """

    run: EvaluatedRun
    model: str
    name: str
    title: str
    role: str
    block_format: str | None
    figures: dict[str, float]
    fingerprint: str
    lineage: dict[str, str]
    seconds: float | None = None
    peak_bytes: int | None = None
    is_gpu_memory: bool = False
    steps: int | None = None
    schedule: dict[str, Json] = field(default_factory=dict)
    answers: list[Transcript] = field(default_factory=list)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    rounding: Rounding | None = None
    twin: str | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the entry of this row in compare.json."""
        model = self.model if self.model in ORDER or is_control(self.model) else self.name
        facts = {"run": self.run.label, "model": model, "role": self.role, "format": self.block_format}
        cost = {"stage_seconds": self.seconds, "stage_peak_bytes": self.peak_bytes}
        rounding = {} if self.rounding is None else {"rounding": vars(self.rounding)}
        return {**facts, **self.figures, **cost, **rounding}


def collect(runs: list[EvaluatedRun]) -> list[Row]:
    """Collect the rows of all runs.

    A model that several runs evaluated has only one row, from the run with the most figures.
    """
    rows = [row for run in runs for row in _collect_run(run, is_alone=len(runs) == 1)]
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.fingerprint, row.model)
        if key not in best or len(row.figures) > len(best[key].figures):
            best[key] = row
    found = [row for row in rows if best[row.fingerprint, row.model] is row]
    _add_loss_changes(found)
    return found


def _collect_run(run: EvaluatedRun, *, is_alone: bool) -> list[Row]:
    results: Mapping[str, Figures] = run.evaluated.read(EvaluateRecord).results
    known = [*ORDER, *(name for name in run.exports if name not in ORDER)]
    names = [*(name for name in known if name in results), *(name for name in results if name not in known)]
    shape = read_shape(run)
    endings = distinct_endings([Path(name) for name in names if is_local(name)])
    prefix = "" if is_alone else run.label
    return [
        _make_row(run, name, results[name], shape=shape, prefix=prefix, shown=endings.get(Path(name), name))
        for name in names
    ]


def _make_row(run: EvaluatedRun, model: str, results: Figures, *, shape: Shape | None, prefix: str, shown: str) -> Row:
    """Make the row of a model. `prefix` is the label of its run, or "". `shown` is the model's name without paths."""
    stage = read_model(run, model)
    lineage = _trace_lineage(run, model)
    answers = _read_answers(run, model)
    trained = _read_training(run, model, stage)
    is_foreign = model == SFT and stage is None and has_foreign_sft(run)
    role = _FOREIGN_SFT if is_foreign else _role(shown, stage, lineage)
    title = f"Control: {role}" if is_control(model) and stage is not None else MODELS.get(model, shown)
    return Row(
        run=run,
        model=model,
        name=f"{prefix}/{shown}" if prefix else shown,
        title=f"{prefix}: {title}" if prefix else title,
        role=role,
        block_format=_block_format(stage),
        figures=flatten(results) | (_size_in_bf16(shape) if is_foreign else sizes(stage, shape)),
        fingerprint=run.evaluated.parents[model],
        lineage=lineage,
        seconds=None if stage is None else stage.seconds,
        peak_bytes=None if stage is None else stage.peak_bytes,
        is_gpu_memory=stage is not None and stage.is_gpu_memory,
        steps=None if trained is None else trained.artifact.read(TrainingRecord).steps,
        schedule={} if trained is None else _schedule(trained),
        answers=answers,
        verdicts={name: verdicts for name, judge in VERDICTS.items() if (verdicts := judge(answers))},
        rounding=None if stage is None else find_rounding(run, stage),
        twin=None if stage is None or not is_export(model) else find_twin(run, stage),
    )


def has_foreign_sft(run: EvaluatedRun) -> bool:
    """Return whether adapters of another program are the SFT of a run."""
    quantized = run.read_stage(PTQ)
    return quantized is not None and quantized.artifact.read(QuantizeRecord).adapters is not None


def read_model(run: EvaluatedRun, model: str) -> StageFacts | None:
    """Read the stage that made a model, or return None if no complete stage of the run made it."""
    if is_control(model):
        return run.read_control(model)
    return run.read_stage(model) if model in ORDER or is_export(model) else None


def _read_training(run: EvaluatedRun, model: str, stage: StageFacts | None) -> StageFacts | None:
    """Read the training stage that `Row.steps` describes, or return None."""
    if control_of(model) == MORE_SFT:
        stage = run.read_stage(model.replace(PTQ, SFT))
    return stage if stage is not None and model != SFT and is_training(stage) else None


def is_training(stage: StageFacts) -> bool:
    """Return whether a stage trains, so that its record is a TrainingRecord."""
    return stage.artifact.stage in (SFT, QAT)


def _schedule(stage: StageFacts) -> dict[str, Json]:
    found = {name: stage.artifact.settings.get(f"{stage.artifact.stage}.{name}") for name in _SCHEDULE}
    return {name: value for name, value in found.items() if name != "epochs" or found["max_steps"] in (None, -1)}


def control_of(model: str) -> str | None:
    """Return the name of the control that made a model, or None if it is another model."""
    return model.split("/")[1] if is_control(model) else None


def flatten(figures: Figures) -> dict[str, float]:
    """Flatten the figures of groups: {figure: {group: {part: value}}} -> {figure_part/group: value}."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        for group, inner in value.items() if isinstance(value, Mapping) else [("", value)]:
            parts = inner if isinstance(inner, Mapping) else {"": inner}
            found |= {f"{name}{part and '_' + part}{group and '/' + group}": each for part, each in parts.items()}
    return found


def _add_loss_changes(rows: list[Row]) -> None:
    """Add `loss_change`: loss / SFT loss - 1.

    The SFT loss is the validation loss of the SFT model in the row's lineage.
    """
    for row in rows:
        sft = next((each for each in rows if each.model == SFT and each.fingerprint == row.lineage.get(SFT)), None)
        if row.model != SFT and sft is not None and {_LOSS} <= row.figures.keys() & sft.figures.keys():
            row.figures["loss_change"] = row.figures[_LOSS] / sft.figures[_LOSS] - 1


def _role(model: str, stage: StageFacts | None, lineage: dict[str, str]) -> str:
    if stage is None:
        return model
    method = stage.artifact.read(QuantizeRecord).method if stage.artifact.stage == PTQ else None
    rounded = f" ({method})" if method else ""
    if (control := control_of(model)) is not None:
        has_ptq = stage.artifact.stage == PTQ
        trained = {MORE_SFT: "SFT + more SFT", BF16_PARTS: "BF16 parts"}.get(control, SFT.upper())
        return f"{trained} + PTQ{rounded}" if has_ptq else trained
    if is_export(model):
        origin = stage.artifact.read(ExportRecord).exported_from
        known = f"control {control_of(origin)}" if is_control(origin) else without_directory(origin)
        form = "" if model == EXPORT else f" as {model.partition('/')[2]}"
        return f"{_role(origin, stage, lineage) if origin in _ROLES else known}, exported{form}"
    role = _ROLES[model] + (rounded if model == PTQ else "")
    return role if SFT in lineage else role.removeprefix("SFT + ")


def _trace_lineage(run: EvaluatedRun, model: str) -> dict[str, str]:
    stage = read_model(run, model)
    if stage is None:
        return {}
    if is_control(model):
        foreign = {SFT: stage.artifact.parents[SFT]} if has_foreign_sft(run) and SFT in stage.artifact.parents else {}
        return {**_trace_lineage(run, SFT), **foreign, model: stage.artifact.fingerprint}
    parents = stage.artifact.parents
    if is_export(model):
        parents = {stage.artifact.read(ExportRecord).exported_from: parents["model"]}
    found = {model: stage.artifact.fingerprint}
    for name, fingerprint in parents.items():
        if name in ORDER or is_control(name):
            earlier = _trace_lineage(run, name)
            found |= earlier if earlier.get(name) == fingerprint else {name: fingerprint}
    return found


def _block_format(stage: StageFacts | None) -> str | None:
    if stage is None:
        return None
    is_packed = stage.artifact.kind in (Kind.packed, Kind.foreign)
    return stage.artifact.format if is_packed else stage.artifact.fake_quantized


# --- sizes -----------------------------------------------------------------------------------------------------------


def read_shape(run: EvaluatedRun) -> Shape | None:
    """Read the shape of the model from the first existing checkpoint of the run."""
    for stage in ORDER:
        directory = run.stage_dir(stage)
        if directory is not None and (directory / "config.json").is_file():
            return Shape.of(read_config(directory), directory)
    return None


def sizes(stage: StageFacts | None, shape: Shape | None) -> dict[str, float]:
    """Compute `served_bytes`: the size of the weights in memory when the model is served.

    An export is served as it is, so its size is the size of its tensors. For any other model, this is the size of its
    export: if a model rounds its experts to a 4-bit format, they are served in this format, and otherwise in BF16. The
    experts of the original are served in its released format.
    """
    if stage is not None and stage.artifact.stage == EXPORT:
        return {"served_bytes": float(stage.artifact.read(ExportRecord).tensor_bytes)}
    if stage is None or shape is None:
        return {}
    was_packed = stage.artifact.stage == UPCAST and stage.artifact.read(UpcastRecord).decoded_tensors > 0
    name = MXFP4.name if was_packed else _block_format(stage)
    bits = FORMATS[name].bits_per_value if name in FORMATS else _BF16_BITS
    experts = sum(projection.values for projection in expert_projections(shape))
    others = sum(info.bytes for info in plain_tensors(shape).values()) - experts * _BF16_BITS // 8
    return {"served_bytes": others + experts * bits / 8}


def _size_in_bf16(shape: Shape | None) -> dict[str, float]:
    return {} if shape is None else {"served_bytes": float(sum(each.bytes for each in plain_tensors(shape).values()))}


def are_twins(row: Row, other: Row) -> bool:
    """Return whether one of two rows is an export of the other that computes with the same expert weights."""
    return row.twin == other.fingerprint or other.twin == row.fingerprint


def list_undominated(rows: Iterable[Row], size: str, quality: str, *, is_higher_better: bool) -> list[Row]:
    """Find the rows that no other row dominates (the Pareto front).

    A row dominates another row if it is smaller or better, and is neither larger nor worse. An export and its twin are
    one model, so they do not dominate each other.

    Args:
        rows: rows of the models. Rows that lack one of the figures are ignored.
        size: name of the figure for size. Less is better.
        quality: name of the figure for quality.
        is_higher_better: whether a higher value of `quality` is better.
    """
    sign = -1 if is_higher_better else 1
    points = [
        (row, row.figures[size], sign * row.figures[quality]) for row in rows if {size, quality} <= {*row.figures}
    ]
    return [
        row
        for row, x, y in points
        if not any(a <= x and b <= y and (a, b) != (x, y) and not are_twins(row, each) for each, a, b in points)
    ]


# --- answers ---------------------------------------------------------------------------------------------------------


def _read_answers(run: EvaluatedRun, model: str) -> list[Transcript]:
    path = run.evaluated.directory / model.strip("/").replace("/", "_") / ANSWERS_FILE
    if not has_answers(run) or not path.is_file():
        return []
    return [_read_transcript(path, line) for line in path.read_bytes().splitlines()]


def _read_transcript(path: Path, line: bytes) -> Transcript:
    try:
        return read_answer(Transcript, line)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: a line is not an answer from `evaluate` ({error}). {advise_rebuild(path.parents[1])}"
        ) from error
