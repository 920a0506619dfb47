"""Find the exports of the compared runs, and collect the answers, the proof and the size of each."""

from dataclasses import dataclass

from pipeline.compare.decision import NO_EXPORT, Decision, Evidence, Rate, Rise, decide
from pipeline.compare.evidence import LOSS, Test, compare_with_itself, reference_of
from pipeline.compare.names import EXPORT, MODELS, SFT, UPCAST
from pipeline.compare.rounding import find_twin
from pipeline.compare.rows import Row, is_training, read_model, read_shape, sizes
from pipeline.compare.runs import EvaluatedRun, StageFacts, distinct_runs, read_facts
from pipeline.compare.tiles import Tile, make_tiles
from pipeline.config import ExportTarget
from pipeline.config.targets import TARGETS
from pipeline.evaluate.scorers import FORM_ONLY
from pipeline.evaluate.scorers.format_health import is_not_truncated
from pipeline.runs.artifacts import Kind
from pipeline.runs.records import ExportRecord, TrainingRecord
from pipeline.training.symptoms import is_risen

_SERVED = "served_bytes"
_READABLE = ExportTarget["bf16"].name


@dataclass(frozen=True)
class Verdict:
    """The part of the report on one export: the decision in words, and the most important figures.

    Attributes:
        label: label of the run, or "" if the report has one run.
        decision: whether to ship the export.
        tiles: the most important figures.
    """

    label: str
    decision: Decision
    tiles: list[Tile]


@dataclass(frozen=True)
class Export:
    """An export, and the models that it is compared with.

    Attributes:
        run: the run of the export.
        made: its artifact and cost.
        measured: the row with its figures: its own, or the row of its twin. None if neither was evaluated.
        reference: the row of the model that it must match, or None.
        proof: the artifact of the `verify` that passed on the present files, or None.
    """

    run: EvaluatedRun
    made: StageFacts
    measured: Row | None
    reference: Row | None
    proof: StageFacts | None

    @property
    def name(self) -> str:
        """The name in a sentence, such as `the MXFP4 export`."""
        target = self.made.artifact.read(ExportRecord).target
        block_format = str(self.made.artifact.format)
        return f"the {block_format.upper()} export" + (f" (target {target})" if target != block_format else "")


def judge_exports(runs: list[EvaluatedRun], rows: list[Row], tests: list[Test], margin: float) -> list[Verdict]:
    """Decide about each export of the runs. Without an export, the only verdict says so."""
    found = [_find(run, rows) for run, _ in distinct_runs(runs, EXPORT)]
    if not found:
        return [Verdict("", NO_EXPORT, [])]
    return [_judge(export, rows, tests, margin, export.run.label if len(runs) > 1 else "") for export in found]


def _judge(export: Export, rows: list[Row], tests: list[Test], margin: float, label: str) -> Verdict:
    own = [test for test in tests if test.model is export.measured and test.reference is export.reference]
    if export.measured is not None and export.measured is export.reference:
        own = compare_with_itself(export.measured)
    served = sizes(export.made, read_shape(export.run)).get(_SERVED)
    whole = None if export.reference is None else export.reference.figures.get(_SERVED)
    evidence = Evidence(
        export=export.name,
        reference=None if export.reference is None else export.reference.title,
        stands_for=None if _is_own(export) or export.measured is None else export.measured.title,
        left_open=dict(_left_open(test) for test in own),
        truncated=dict(_truncated(row) for row in (export.reference, export.measured) if row is not None),
        rates=[_rate(test) for test in own if test.comparison is not None],
        loss=None if export.measured is None else export.measured.figures.get(LOSS),
        is_verified=export.proof is not None,
        is_compared=_proves_the_twin(export.made, export.proof),
        rises=_rises(export, rows),
        measured_by=_how_to_measure(export),
        smaller=whole / served if whole and served else None,
    )
    lineage = export.measured.lineage if export.measured is not None else {}
    made = [row for row in rows if row.fingerprint in lineage.values() and row.model in lineage]
    tiles = make_tiles(evidence, export.measured, served=served, whole=whole, proof=export.proof, made=made)
    return Verdict(label, decide(evidence, margin), tiles)


def _rises(export: Export, rows: list[Row]) -> list[Rise]:
    """Find the training stages that raised the validation loss, and whether all steps together raised it."""
    if (measured := export.measured) is None:
        return []
    found = []
    for model, fingerprint in measured.lineage.items():
        stage = read_model(export.run, model)
        if stage is None or stage.artifact.fingerprint != fingerprint:
            continue
        if is_training(stage):
            made = stage.artifact.read(TrainingRecord)
            found.append(Rise(MODELS.get(model, model), made.validation_loss_before, made.validation_loss))
    untrained = next((row for row in rows if row.model == UPCAST and row.run is export.run), None)
    if untrained is not None and {LOSS} <= measured.figures.keys() & untrained.figures.keys():
        found.append(Rise("training with rounding", untrained.figures[LOSS], measured.figures[LOSS]))
    return [rise for rise in found if is_risen(rise.before, rise.after)]


def _how_to_measure(export: Export) -> str:
    """Return the commands that measure an export without answers. They end in a report that decides about it."""
    artifact, evaluate = export.made.artifact, "stage=evaluate eval=full evaluate.source"
    if export.reference is None or not export.reference.verdicts:
        return f"{evaluate}=all"
    if artifact.kind is not Kind.foreign:
        return f"{evaluate}={EXPORT}"
    origin = artifact.read(ExportRecord).exported_from
    if find_twin(export.run, export.made) is None and artifact.format in TARGETS[_READABLE].holds:
        return f"stage=export export.target={_READABLE} export.source={origin}, then {evaluate}={EXPORT}"
    if find_twin(export.run, export.made) is None:
        return f"stage=export with the format and the scale_rule that {origin} was trained for"
    return f"{evaluate}={origin}" if _proves_the_twin(export.made, export.proof) else "stage=verify"


def _left_open(test: Test) -> tuple[str, tuple[int, int]]:
    """Return a figure, and how many prompts that decide the reference leave the model open, of how many."""
    decided = sum(each.passed is not None for each in test.reference.verdicts[test.figure] if each.sample == 0)
    compared = 0 if test.comparison is None else test.comparison.prompts
    return test.figure, (decided - compared, decided)


def _is_own(export: Export) -> bool:
    return export.measured is not None and export.measured.fingerprint == export.made.artifact.fingerprint


def _rate(test: Test) -> Rate:
    found = test.comparison
    assert found is not None
    bounds = (found.interval.low, found.interval.high)
    judged = [each.passed for each in test.reference.verdicts[test.figure] if each.sample == 0]
    passed = [each for each in judged if each is not None]
    return Rate(
        test.figure,
        found.prompts,
        found.difference,
        *bounds,
        test.verdict,
        reference=sum(passed) / len(passed),
        judges_content=test.figure not in FORM_ONLY,
    )


def _truncated(row: Row) -> tuple[str, tuple[int, int]]:
    """Return a model's name, and how many of its answers reached the limit of tokens, of how many."""
    return row.title, (sum(not is_not_truncated(each) for each in row.answers), len(row.answers))


def _find(run: EvaluatedRun, rows: list[Row]) -> Export:
    made = run.read_stage(EXPORT)
    assert made is not None
    proof = _find_proof(run, made)
    measured = next((row for row in rows if row.fingerprint == made.artifact.fingerprint), None)
    if measured is None and _proves_the_twin(made, proof):
        twin = find_twin(run, made)
        measured = next((row for row in rows if row.fingerprint == twin), None)
    reference = None if measured is None else reference_of(measured, rows)
    if reference is None:
        reference = next(
            (row for stage in (SFT, UPCAST) for row in rows if row.model == stage and row.run is run), None
        )
    return Export(run, made, measured, reference, proof)


def _find_proof(run: EvaluatedRun, export: StageFacts) -> StageFacts | None:
    same = [each for each in run.exports.values() if each.artifact.fingerprint == export.artifact.fingerprint]
    proof = same[0].proof if same else None
    return None if proof is None else read_facts(proof.directory)


def _proves_the_twin(export: StageFacts, proof: StageFacts | None) -> bool:
    """Return whether `verify` compared the export with the model that it was made from, bit for bit."""
    return proof is not None and proof.artifact.parents.get("model") == export.artifact.parents["model"]
