"""Find how the experts of a model were rounded, and the account of this rounding (see docs/formats.md)."""

from dataclasses import dataclass
from typing import Any

from pipeline.compare.runs import EvaluatedRun, StageFacts
from pipeline.config import Stage
from pipeline.runs.artifacts import Artifact, Kind
from pipeline.runs.records import ExportRecord, QuantizeRecord


@dataclass(frozen=True)
class Rounding:
    """The rounding of a model's experts.

    Attributes:
        method: method and scales, such as "stochastic, base".
        account: figures of the account, documented in `export.account`.
    """

    method: str
    account: dict[str, Any]


def find_rounding(run: EvaluatedRun, model: StageFacts) -> Rounding | None:
    """Return the rounding of a model. Return None if nothing was rounded or accounted for.

    Only `quantize` and `export` account for rounding. QAT's model has the account of its export, which rounds the same
    weights to the same values as QAT's forward pass.
    """
    artifact = model.artifact
    if artifact.stage == Stage.quantize.name:
        return _of_quantize(artifact)
    if artifact.stage == Stage.export.name:
        return _of_export(artifact)
    if artifact.stage != Stage.qat.name:
        return None
    made = [each.artifact for each in run.exports.values() if each.artifact.parents["model"] == artifact.fingerprint]
    same = (each for each in made if (each.format, each.scale_rule) == (artifact.fake_quantized, artifact.scale_rule))
    return next((_of_export(each) for each in same), None)


def _of_quantize(artifact: Artifact) -> Rounding | None:
    record = artifact.read(QuantizeRecord)
    return None if record.account is None else Rounding(f"{record.method}, {record.scales}", record.account)


def _of_export(artifact: Artifact) -> Rounding | None:
    account = artifact.read(ExportRecord).account
    return None if account is None else Rounding(f"nearest, {artifact.scale_rule}", account)


def find_twin(run: EvaluatedRun, export: StageFacts) -> str | None:
    """Return the fingerprint of the model that an export was made from, if both round the experts to the same values.

    Only a model that rounds to the export's format has the same values. The scale rule must be the same, unless the
    model holds rounded experts.
    """
    artifact = export.artifact
    origin = run.read_stage(artifact.read(ExportRecord).exported_from)
    if origin is None or origin.artifact.fingerprint != artifact.parents["model"]:
        return None
    made = origin.artifact
    rounds = (made.format if made.kind is Kind.packed else made.fake_quantized) == artifact.format
    has_same_rule = made.kind is Kind.packed or made.scale_rule == artifact.scale_rule
    return made.fingerprint if rounds and has_same_rule else None
