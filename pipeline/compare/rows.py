"""The models of some runs, one row each: what they are, what was measured of them, what they cost."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.gpt_oss import Shape, expert_projections, plain_tensors
from pipeline.compare.runs import Run, answers_prompts
from pipeline.errors import UserError
from pipeline.evaluate.scorers import VERDICTS
from pipeline.evaluate.transcripts import Transcript
from pipeline.evaluate.verdicts import Verdict
from pipeline.numerics.formats import FORMATS, MXFP4
from pipeline.runs.artifacts import EVALUATED_STAGES, Kind

ANSWERS_FILE = "generations.jsonl"
ORDER = tuple(stage.name for stage in EVALUATED_STAGES)
UPCAST, SFT, PTQ, QAT, EXPORT = ORDER
_ROLES = {UPCAST: "original", SFT: "SFT", PTQ: "SFT + PTQ", QAT: "SFT + QAT"}
_BF16_BITS = 16
_LOSS = "validation_loss"


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        run: that measured it.
        model: its name among the results: a stage, a directory, or a model on a server.
        title: what the report calls it.
        role: what was done to the original to get it; the model's name where that is not known.
        block_format: 4-bit format of the experts' weights in the forward pass, or None.
        figures: by name; those of a group end in /<group>.
        fingerprint: of the model.
        lineage: stage -> fingerprint of what it was made from, itself included.
        seconds, peak_bytes: that its stage took; peak of the main process, on its GPU if it has one.
        answers: to the prompts, where it was asked any.
        verdicts: figure -> on those answers.
    """

    run: Run
    model: str
    title: str
    role: str
    block_format: str | None
    figures: dict[str, float]
    fingerprint: str
    lineage: dict[str, str]
    seconds: float | None = None
    peak_bytes: int | None = None
    answers: list[Transcript] = field(default_factory=list)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The row as compare.json has it."""
        facts = {"run": self.run.label, "model": self.model, "role": self.role, "format": self.block_format}
        return {**facts, **self.figures, "stage_seconds": self.seconds, "stage_peak_bytes": self.peak_bytes}


def of(runs: list[Run]) -> list[Row]:
    """The rows of all runs, a model that several have measured once: where most was measured of it."""
    rows = [row for run in runs for row in _of(run, is_alone=len(runs) == 1)]
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.fingerprint, row.model)
        if key not in best or len(row.figures) > len(best[key].figures):
            best[key] = row
    found = [row for row in rows if best[row.fingerprint, row.model] is row]
    _loss_changes(found)
    return found


def _of(run: Run, is_alone: bool) -> list[Row]:
    results = run.evaluated.details["results"]
    names = [*(name for name in ORDER if name in results), *(name for name in results if name not in ORDER)]
    shape = _shape(run)
    return [_row(run, name, results, shape, is_alone) for name in names]


def _row(run: Run, model: str, results: dict[str, Any], shape: Shape | None, is_alone: bool) -> Row:
    record = run.record(model) if model in ORDER else None
    lineage = _lineage(run, model)
    answers = _answers(run, model)
    figures = flat(results[model]) | _sizes(record, shape)
    return Row(
        run,
        model,
        model if is_alone else f"{run.label}/{model}",
        _role(model, record, lineage),
        _block_format(record),
        figures,
        run.evaluated.parents[model],
        lineage,
        None if record is None else record["seconds"],
        None if record is None else record["peak_device_memory_bytes"] or record["peak_memory_bytes"],
        answers,
        {name: verdicts for name, judge in VERDICTS.items() if (verdicts := judge(answers))},
    )


def flat(figures: dict[str, Any]) -> dict[str, float]:
    """Figures of groups, {figure: {group: value}} or {figure: {group: {part: value}}}, as figure_part/group."""
    found: dict[str, float] = {}
    for name, value in figures.items():
        for group, inner in value.items() if isinstance(value, dict) else [("", value)]:
            parts = inner if isinstance(inner, dict) else {"": inner}
            found |= {f"{name}{part and '_' + part}{group and '/' + group}": each for part, each in parts.items()}
    return found


def _loss_changes(rows: list[Row]) -> None:
    """Add `loss_change`, of the validation loss against that of the SFT that a model was made from."""
    for row in rows:
        sft = next((each for each in rows if each.model == SFT and each.fingerprint == row.lineage.get(SFT)), None)
        if row.model != SFT and sft is not None and {_LOSS} <= row.figures.keys() & sft.figures.keys():
            row.figures["loss_change"] = row.figures[_LOSS] / sft.figures[_LOSS] - 1


def _role(model: str, record: dict[str, Any] | None, lineage: dict[str, str]) -> str:
    if record is None:
        return model
    if model == EXPORT:
        origin = record["details"]["exported_from"]
        return f"{_role(origin, record, lineage) if origin in _ROLES else origin}, exported"
    return _ROLES[model] if SFT in lineage else _ROLES[model].removeprefix("SFT + ")


def _lineage(run: Run, model: str) -> dict[str, str]:
    record = run.record(model) if model in ORDER else None
    if record is None:
        return {}
    parents = dict(record["parents"])
    if model == EXPORT:
        parents = {record["details"]["exported_from"]: parents["model"]}
    found = {model: record["fingerprint"]}
    for stage, fingerprint in parents.items():
        if stage in ORDER:
            earlier = _lineage(run, stage)
            found |= earlier if earlier.get(stage) == fingerprint else {stage: fingerprint}
    return found


def _block_format(record: dict[str, Any] | None) -> str | None:
    if record is None:
        return None
    is_packed = record["kind"] in (Kind.packed.name, Kind.foreign.name)
    return record["format"] if is_packed else record["fake_quantized"]


# --- sizes -----------------------------------------------------------------------------------------------------------


def _shape(run: Run) -> Shape | None:
    """Sizes of the model, from any of its checkpoints that is still there."""
    for stage in ORDER:
        directory = run.stage_dir(stage)
        if directory is not None and (directory / "config.json").is_file():
            return Shape.of(read_config(directory), directory)
    return None


def _sizes(record: dict[str, Any] | None, shape: Shape | None) -> dict[str, float]:
    """`served_bytes`: of the weights in memory when the model is served in the format that it rounds to.

    The original is served as it was released; what rounds nothing, in BF16.
    """
    if record is None or shape is None:
        return {}
    was_packed = record["stage"] == UPCAST and record["details"].get("decoded_tensors", 0) > 0
    name = MXFP4.name if was_packed else _block_format(record)
    bits = FORMATS[name].bits_per_value if name in FORMATS else _BF16_BITS
    experts = sum(projection.values for projection in expert_projections(shape))
    others = sum(info.bytes for info in plain_tensors(shape).values()) - experts * _BF16_BITS // 8
    return {"served_bytes": others + experts * bits / 8}


def undominated(rows: Iterable[Row], size: str, quality: str, sign: int) -> list[Row]:
    """Rows that no other beats: none is as small and as good, and in one of the two better (Pareto).

    Args:
        rows: those without both figures are left out.
        size: figure of which less is better.
        quality: figure of which more is better (sign 1) or less (sign -1).
    """
    points = [
        (row, row.figures[size], -sign * row.figures[quality]) for row in rows if {size, quality} <= {*row.figures}
    ]
    return [row for row, x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for _, a, b in points)]


# --- answers ---------------------------------------------------------------------------------------------------------


def _answers(run: Run, model: str) -> list[Transcript]:
    path = run.evaluated.directory / model.strip("/").replace("/", "_") / ANSWERS_FILE
    if not answers_prompts(run) or not path.is_file():
        return []
    return [_transcript(path, line) for line in path.read_bytes().splitlines()]


def _transcript(path: Path, line: bytes) -> Transcript:
    try:
        return Transcript(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: a line is not an answer of this program ({error}). Evaluate the run again with overwrite=true."
        ) from error
