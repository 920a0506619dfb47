"""Make the tiles of the report: quality kept, size, verification, and time and memory of one export."""

from dataclasses import dataclass

from pipeline.compare.decision import Evidence, Rate
from pipeline.compare.digits import duration, show, significant, size
from pipeline.compare.evidence import KL, LOSS, NOTHING
from pipeline.compare.names import EXPORT, figure_name
from pipeline.compare.rows import Row
from pipeline.compare.runs import StageFacts
from pipeline.config.engines import LIBRARIES
from pipeline.evaluate.statistics import BETTER, WORSE
from pipeline.runs.records import VerifyRecord

_AGREEMENT = "top1_agreement"
_PASSED = "ok"


@dataclass(frozen=True)
class Tile:
    """A figure in large type, with its title above and notes below."""

    title: str
    value: str
    notes: list[str]


def make_tiles(
    evidence: Evidence,
    measured: Row | None,
    *,
    served: float | None,
    whole: float | None,
    proof: StageFacts | None,
    made: list[Row],
) -> list[Tile]:
    """Make the tiles of an export.

    Args:
        evidence: the facts about the export.
        measured: the row with its figures, or None.
        served: size of its weights in memory, in bytes, or None.
        whole: the same of the reference, or None.
        proof: the artifact of `verify`, or None.
        made: the rows of the models that led to the export, with the export, if they were evaluated.
    """
    quality = _quality(evidence, measured)
    return [quality, _size(evidence, measured, served, whole), _verified(proof), _cost(made)]


def _quality(evidence: Evidence, measured: Row | None) -> Tile:
    title = f"Quality kept against {evidence.reference}" if evidence.reference else "Quality kept"
    described = [] if measured is None else [_agreement(measured), _divergence(measured), _loss(measured)]
    notes = [note for note in described if note]
    if evidence.rates:
        worst = min(evidence.rates, key=lambda rate: rate.low)
        return Tile(title, f"{100 * worst.difference:+.1f} points", [_describe(worst), *notes])
    return Tile(title, "not measured", ["no answers were compared", *notes])


def _describe(rate: Rate) -> str:
    outcome = {WORSE: "significantly worse", BETTER: "significantly better"}.get(rate.verdict, NOTHING)
    return (
        f"{figure_name(rate.figure)}, {outcome}, 95 % interval {100 * rate.low:+.1f} to {100 * rate.high:+.1f},"
        f" {rate.prompts} prompts"
    )


def _agreement(row: Row) -> str:
    if _AGREEMENT not in row.figures:
        return ""
    low, high = (row.figures.get(f"{_AGREEMENT}{part}") for part in ("_low", "_high"))
    shares = (None if low is None else 100 * low, None if high is None else 100 * high)
    agreement = show(100 * row.figures[_AGREEMENT], *shares, unit=" %")
    return f"{figure_name(_AGREEMENT)} {agreement}"


def _divergence(row: Row) -> str:
    return f"{figure_name(KL)} {significant(row.figures[KL])} nats" if KL in row.figures else ""


def _loss(row: Row) -> str:
    if "loss_change" not in row.figures:
        return ""
    return f"validation loss {row.figures[LOSS]:.3f} ({100 * row.figures['loss_change']:+.1f} %)"


def _size(evidence: Evidence, measured: Row | None, served: float | None, whole: float | None) -> Tile:
    title = "Weights in memory when served"
    if served is None:
        return Tile(title, "unknown", [])
    notes = []
    if whole and evidence.smaller is not None:
        notes.append(f"{evidence.reference} takes {size(whole)}, {evidence.smaller:.2f} × as much")
    if measured is not None and "weight_bytes" in measured.figures and not evidence.stands_for:
        notes.append(f"{size(measured.figures['weight_bytes'])} on disk")
    return Tile(title, size(served), notes)


def _verified(proof: StageFacts | None) -> Tile:
    if proof is None:
        return Tile("Verified", "no", ["stage=verify has not passed on this export"])
    record = proof.artifact.read(VerifyRecord)
    passed = [title for title, status in record.checks.items() if status == _PASSED]
    engines = [name for title in passed if (name := title.partition(":")[0]) in LIBRARIES]
    compared = "model" in proof.artifact.parents
    exact = (
        "equal to the trained model, bit for bit"
        if compared
        else "compared with the base model alone, not with the trained model"
    )
    loaded = f"loaded by {', '.join(engines)}" if engines else "no engine was tried (verify.engines)"
    return Tile("Verified", f"{len(passed)} checks passed", [exact, loaded])


def _cost(made: list[Row]) -> Tile:
    known = [row for row in made if row.seconds is not None]
    title = "Time and memory"
    if not known:
        return Tile(title, "unknown", [])
    seconds = sum(row.seconds for row in known if row.seconds is not None)
    most = max(known, key=lambda row: row.peak_bytes or 0)
    memory = "GPU memory" if most.is_gpu_memory else "host memory, without a GPU"
    stages = ", ".join(row.model for row in sorted(known, key=lambda row: row.model == EXPORT))
    return Tile(title, duration(seconds), [stages, f"at most {size(most.peak_bytes or 0)} of {memory}"])
