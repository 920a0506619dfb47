"""Everything that the checks and the report of `doctor` use: figures of the data, needs, and the free resources."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, cast

from pipeline.checkpoints.gpt_oss import GptOssJson
from pipeline.checkpoints.largest_codes import CodeFigures
from pipeline.doctor.content import (
    ControlTextFigures,
    CopyFigures,
    EmptyAnswerFigures,
    ReasoningFigures,
    ToolFigures,
    UnansweredFigures,
    UnofferedFigures,
    UntrainedFigures,
)
from pipeline.doctor.leaks import LeakFigures
from pipeline.doctor.needs import NeedFigures
from pipeline.doctor.parity import ParityFigures
from pipeline.doctor.plan import Plan
from pipeline.doctor.renderings import RenderingFigures
from pipeline.doctor.rows import Lengths, NothingToLearn, TokenCounts, Truncated
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run


class RowCounts(TypedDict):
    """Numbers of rows: in total, for training, and for validation."""

    all: int
    train: int
    validation: int


class ValidationFigures(TypedDict):
    """Figures of the validation rows alone, and `source`: the path and split of their data set."""

    source: str
    rows: int
    tokens: TokenCounts
    lengths: Lengths
    cut: Truncated


class UnusedFigures(TypedDict):
    """Lines about columns and keys that are not used: those that may matter, and harmless ones."""

    warnings: list[str]
    remarks: list[str]


class DataFigures(TypedDict):
    """Figures of the data in artifact.json. Each part is defined in the module of this package that computes it."""

    rows: RowCounts
    tokens: TokenCounts
    lengths: Lengths
    cut: Truncated
    nothing_to_learn: NothingToLearn
    reasoning: ReasoningFigures
    reasoning_effort: dict[str, int]
    tools: ToolFigures
    unoffered: UnofferedFigures
    empty_answers: EmptyAnswerFigures
    unanswered: UnansweredFigures
    control_text: ControlTextFigures
    copies: CopyFigures
    leaks: LeakFigures
    languages: dict[str, dict[str, int]]
    parity: ParityFigures
    untrained: UntrainedFigures
    rendering: RenderingFigures
    unused: UnusedFigures
    validation: NotRequired[ValidationFigures]
    """Figures of the rows of data.validation. Missing if validation rows are held out."""


@dataclass(frozen=True)
class Facts:
    """Everything that a check may use.

    Attributes:
        data: figures of the data.
        needs: bytes that the run needs.
        machine: free resources of this machine.
        plan: settings of the run.
        model: content of the source's config.json.
        run: the run. Stages that are complete need no further disk space.
        largest_codes: shares of the base's blocks by their largest code, or None if its MXFP4 weights are not here.
    """

    data: DataFigures
    needs: NeedFigures
    machine: Mapping[str, int]
    plan: Plan
    model: GptOssJson
    run: Run
    largest_codes: CodeFigures | None = None

    @classmethod
    def of(cls, report: DoctorRecord, machine: Mapping[str, int], plan: Plan, model: GptOssJson, run: Run) -> "Facts":
        """Combine the figures of a report with the present state of the machine."""
        data, needs = cast(DataFigures, report.data), cast(NeedFigures, report.needs)
        return cls(data, needs, machine, plan, model, run, report.largest_codes)
