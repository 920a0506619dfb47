"""Define a record for each stage. artifact.json holds the record under `details`.

A stage returns its record, `runs.building` writes it, and later stages and reports read it back with `Artifact.read`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_OPTIONAL: Mapping[str, bool] = {"optional": True}  # artifact.json omits a field of this kind if it is None
_OTHERS: Mapping[str, bool] = {"others": True}  # artifact.json holds each item of this dictionary as if it were a field

Record = TypeVar("Record", bound="StageRecord")


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """A stage's record. JSON can represent all its values."""

    def details(self) -> dict[str, Any]:
        """Return the record in the form of artifact.json."""
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
        """Make a record from the `details` of artifact.json.

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
    """Figures of `doctor` by topic, and its findings. Most topics have a file in `pipeline/doctor`.

    `largest_codes` are figures of the base, as in `UpcastRecord`. They are None if its MXFP4 weights are not here.
    """

    data: dict[str, Any]
    needs: dict[str, Any]
    machine: dict[str, Any]
    findings: list[str]
    largest_codes: dict[str, Any] | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class ModelRecord(StageRecord):
    """The part of a record that all stages with a model share.

    Attributes:
        dtype: type of the weights in training. Adapters are merged in this type.
        base: directory of the full checkpoint, relative to the run's directory, or None for the stage's own directory.
    """

    dtype: str
    base: str | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class UpcastRecord(ModelRecord):
    """The checkpoint that training starts from.

    Attributes:
        decoded_tensors, packed_tensors, copied_tensors: numbers of tensors.
        tensor_bytes: bytes of all tensors.
        source: directory of the source.
        largest_codes: shares of the MXFP4 blocks by their largest code, documented in `checkpoints.largest_codes`. None
            if the source is BF16 and is not packed, and in artifacts of older versions.
    """

    decoded_tensors: int
    packed_tensors: int
    copied_tensors: int
    tensor_bytes: int
    source: str
    largest_codes: dict[str, Any] | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class TrainingRecord(ModelRecord):
    """A training stage.

    Attributes:
        steps: number of optimizer steps.
        kept_step: the step whose weights are the result.
        train_loss_first, train_loss_last: the first and the last training loss in the log.
        validation_loss_before, validation_loss: loss before training, and loss of the kept weights. Each
            is a mean over supervised tokens.
        quantizers: number of fake quantizers that ran, or None if the model has none.
        attn_implementation: the attention kernel that was used, or None in artifacts of older versions.
        start: directory of the earlier SFT that this one continues, relative to the run's directory, or None.
        counts: numbers of rows, examples, tokens, truncated examples and dropped examples.
    """

    steps: int
    kept_step: int
    train_loss_first: float
    train_loss_last: float
    validation_loss_before: float
    validation_loss: float
    quantizers: int | None = field(default=None, metadata=_OPTIONAL)
    attn_implementation: str | None = field(default=None, metadata=_OPTIONAL)
    start: str | None = field(default=None, metadata=_OPTIONAL)
    counts: dict[str, int] = field(default_factory=dict, metadata=_OTHERS)


@dataclass(frozen=True, kw_only=True)
class QuantizeRecord(ModelRecord):
    """A quantized model, and how much of the change that training made its rounding keeps.

    Attributes:
        quantizers: number of fake quantizers that were inserted.
        method: the method that rounded the experts: value of quantize.method, or the one that `auto` chose. None in
            artifacts of older versions.
        scales: `base` or the rule that chose the scales, or None without an account.
        account: figures of rounding, documented in `export.account`. None if the upcast was removed.
        fallback: for method gptq, how many experts there are (`experts`), how many of them had too few tokens and were
            rounded by the fallback (`fallback_experts`), and how many had no token (`without_tokens`).
        candidates: with quantize.method=auto, the roundings that were tried (see `quantize.selection.Candidate`).
        adapters: directory of the adapters of another program that are the run's SFT, or None.
        writes_rounded: whether the experts on disk are rounded. None without `adapters`.
    """

    quantizers: int
    method: str | None = field(default=None, metadata=_OPTIONAL)
    scales: str | None = field(default=None, metadata=_OPTIONAL)
    account: dict[str, float | None] | None = field(default=None, metadata=_OPTIONAL)
    fallback: dict[str, int] | None = field(default=None, metadata=_OPTIONAL)
    candidates: list[Any] | None = field(default=None, metadata=_OPTIONAL)
    adapters: str | None = field(default=None, metadata=_OPTIONAL)
    writes_rounded: bool | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class ExportRecord(StageRecord):
    """An export, and how much of the fine-tuning reached its 4-bit weights.

    Attributes:
        target: layout of the export, a name in TARGETS.
        exported_from, exported_directory: name and directory of the model that was exported.
        tensor_bytes: bytes of all tensors.
        expert_weights: number of weights in the experts.
        copied_tensors, copied_experts: how many tensors and how many experts kept the source's bytes.
        encoded_tensors: number of all other tensors.
        copied: names of the tensors that kept the source's bytes.
        other_than_trained: number of expert weights whose value differs from the value in training. It is above 0 only
            if the model was trained for another format (export.requantize).
        relative_squared_error, snr_db: error of rounding the experts. `snr_db` is None if rounding changed nothing.
        moved_weights: share of the weights that training changed.
        changed_codes: share of the weights whose 4-bit value differs from the base model's value.
        changed_scales: share of the blocks whose scale and values both differ from the base model's.
        survival: share of the moved weights whose 4-bit value changed.
        saturated_blocks: share of the blocks whose scale is too small for their largest weight.
        account: figures of rounding, documented in `export.account`. None in artifacts of older versions.
        own_files: names of the side files that the exported model has in place of the base model's. None if it has the
            base model's files.
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
    account: dict[str, float | None] | None = field(default=None, metadata=_OPTIONAL)
    own_files: list[str] | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class VerifyRecord(StageRecord):
    """Status of each check, keyed by the check's title. A list names everything that was not checked."""

    checks: dict[str, str]
    not_checked: list[str]


@dataclass(frozen=True, kw_only=True)
class EvaluateRecord(StageRecord):
    """Figures of each model. Its weights and predictions were compared with the model `reference`."""

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
