"""What stages tell one another: for each stage the record that its artifact.json holds under `details`.

A stage returns its record, `runs.building` writes it, and later stages and reports read it back with `Artifact.read`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_OPTIONAL: Mapping[str, bool] = {"optional": True}  # left out of artifact.json where it is None
_OTHERS: Mapping[str, bool] = {"others": True}  # a dictionary, whose items stand beside the fields in artifact.json

Record = TypeVar("Record", bound="StageRecord")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage's record; values that JSON can hold."""

    def details(self) -> dict[str, Any]:
        """The record as artifact.json holds it."""
        found: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if "others" in each.metadata:
                found |= value
            elif value is not None or "optional" not in each.metadata:
                found[each.name] = value
        return found

    @classmethod
    def from_details(cls: type[Record], details: Mapping[str, Any]) -> Record:
        """Read a record back.

        Raises:
            KeyError: a field is missing.
        """
        own = [each for each in fields(cls) if "others" not in each.metadata]
        values = {
            each.name: details.get(each.name) if "optional" in each.metadata else details[each.name] for each in own
        }
        rest = {name: value for name, value in details.items() if name not in values}
        return cls(**values, **{each.name: rest for each in fields(cls) if "others" in each.metadata})


@dataclass(frozen=True, kw_only=True)
class DoctorRecord(StageRecord):
    """What doctor found: figures by topic, as its files in `pipeline/doctor` name them, and messages."""

    data: dict[str, Any]
    needs: dict[str, Any]
    machine: dict[str, Any]
    findings: list[str]


@dataclass(frozen=True, kw_only=True)
class ModelRecord(StageRecord):
    """What every stage says that leaves a model.

    Attributes:
        dtype: type of the weights in training, in which adapters are merged.
        base: directory of the full checkpoint, relative to the run's; None: the stage's own directory.
    """

    dtype: str
    base: str | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class UpcastRecord(ModelRecord):
    """Counts of tensors that were decoded and copied, bytes of all, and the directory that they came from."""

    decoded_tensors: int
    copied_tensors: int
    tensor_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(ModelRecord):
    """A training stage.

    Attributes:
        steps: optimizer steps that were made.
        kept_step: the step whose weights were kept.
        train_loss_first, train_loss_last: as logged.
        validation_loss_before, validation_loss: over supervised tokens, before training and of the kept weights.
        quantizers: number of fake quantizers that ran, or None without any.
        counts: rows, examples and tokens that the data gave, and how many were truncated or left out.
    """

    steps: int
    kept_step: int
    train_loss_first: float
    train_loss_last: float
    validation_loss_before: float
    validation_loss: float
    quantizers: int | None = field(default=None, metadata=_OPTIONAL)
    counts: dict[str, int] = field(default_factory=dict, metadata=_OTHERS)


@dataclass(frozen=True, kw_only=True)
class QuantizeRecord(ModelRecord):
    """Number of fake quantizers that were inserted."""

    quantizers: int


@dataclass(frozen=True, kw_only=True)
class ExportRecord(StageRecord):
    """An export, and how much of the fine-tuning reached its 4-bit weights.

    Attributes:
        target: its layout, a row of TARGETS.
        exported_from, exported_directory: name and directory of the model that was exported.
        tensor_bytes: of all tensors.
        expert_weights: number of weights in the experts.
        copied_tensors, encoded_tensors, copied_experts: counts of what kept the source's bytes, and of what did not.
        copied: names of the tensors that kept the source's bytes.
        other_than_trained: weights that training rounded to another value, for a model of another format.
        relative_squared_error, snr_db: of rounding the experts; `snr_db` is None where rounding changed nothing.
        moved_weights, changed_codes, changed_scales: shares that differ from the base model's.
        survival: share of the moved weights whose 4-bit value changed.
        saturated_blocks: share of blocks whose scale does not hold the largest weight.
    """

    target: str
    exported_from: str
    exported_directory: str
    tensor_bytes: int
    expert_weights: int
    copied_tensors: int
    encoded_tensors: int
    copied_experts: int
    copied: list[str]
    other_than_trained: int
    relative_squared_error: float
    snr_db: float | None
    moved_weights: float
    changed_codes: float
    changed_scales: float
    survival: float
    saturated_blocks: float


@dataclass(frozen=True, kw_only=True)
class VerifyRecord(StageRecord):
    """Title -> status of every check that passed or was skipped, and what remains unchecked."""

    checks: dict[str, str]
    not_checked: list[str]


@dataclass(frozen=True, kw_only=True)
class EvaluateRecord(StageRecord):
    """Model -> figure -> value, and the model that weights and predictions were compared with."""

    reference: str | None
    results: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CompareRecord(StageRecord):
    """Number of models in the report."""

    rows: int


@dataclass(frozen=True, kw_only=True)
class PublishRecord(StageRecord):
    """Number of files in the directory to upload."""

    files: int
