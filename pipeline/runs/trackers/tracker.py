"""The interface of a tracker, and the values that it gets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import TrackingConfig

DATASET, MODEL, MODEL_FILES, REPORT = "dataset", "model", "model-files", "report"
"""Kinds of items. Models and their files are two items, so that a model is the same item with and without its files."""


@dataclass(frozen=True)
class TrackedStage:
    """One stage of a pipeline run, as a tracker gets it when the stage begins.

    Attributes:
        stage: name of the stage.
        part: name of the part of the stage, such as the target of an export, or None.
        name: name of the pipeline run.
        group: unique name of the pipeline run. All its stages share it.
        id: unique name of the stage and its part in the pipeline run. A repeated stage keeps it.
        labels: recipe, model and format.
        config: the configuration as plain nested values, without secrets.
        directory: directory of the pipeline run. Local files of the tracker belong below it.
        settings: the settings of the tracker.
    """

    stage: str
    part: str | None
    name: str
    group: str
    id: str
    labels: Mapping[str, str]
    config: Mapping[str, Any]
    directory: Path
    settings: TrackingConfig

    @property
    def title(self) -> str:
        """Name for lists: the names of the pipeline run, the stage and its part."""
        return "-".join([self.name, self.stage, *([] if self.part is None else [self.part])])

    @property
    def tags(self) -> list[str]:
        """The user's tags and the labels, each once."""
        return list(dict.fromkeys([*self.settings.tags, *self.labels.values()]))


@dataclass(frozen=True)
class Reading:
    """One line of metrics.

    Attributes:
        time: seconds since 1970.
        step: the training step, layer or candidate of the line, or None.
        numbers: key -> number. A key begins with the name of the model, as in `sft/loss`.
        texts: key -> text.
    """

    time: float
    step: int | None
    numbers: Mapping[str, float]
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Item:
    """An input or output of a stage: a data set, a model or a report.

    Attributes:
        name: letters, digits, `-`, `_` and `.`. Versions of one thing share the name.
        kind: one of the kinds above.
        fingerprint: hash of the contents.
        description: plain values. Equal contents have equal descriptions, whichever stage describes them.
        files: name in the item -> file to store with it.
    """

    name: str
    kind: str
    fingerprint: str
    description: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Hint:
    """A command that shows or uploads the stages. Commands that differ only in `place` are printed as one."""

    purpose: str
    command: str
    place: str = ""


class Tracker(Protocol):
    """One stage at a tracker. It begins when the object is created, which raises UserError if that is impossible."""

    title: str
    """Name of the tracker, for messages."""
    failures: tuple[type[Exception], ...]
    """The exceptions of the methods below that mean that the tracker does not work."""

    @property
    def hint(self) -> Hint | None:
        """The command to run after the program, or None."""

    @property
    def rescue(self) -> str:
        """How to get what the tracker has on disk after a failure. It is empty if there is nothing to do."""

    @property
    def url(self) -> str | None:
        """Where the stage can be watched, or None."""

    def log(self, reading: Reading) -> None:
        """Store one line of metrics."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Store a table. A later table of the same name replaces it."""

    def log_media(self, images: Mapping[str, Path], pages: Mapping[str, Path]) -> None:
        """Store PNG images and HTML pages, each under its name."""

    def use(self, item: Item) -> None:
        """Record an input of the stage. Its files are not stored."""

    def make(self, item: Item) -> None:
        """Record an output of the stage, with its files."""

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Store the final figures of the stage. Their keys are like those of `Reading`."""

    def finish(self, succeeded: bool) -> None:
        """End the stage after the last write."""


class OnDisk:
    """What trackers share that write only to the run's directory."""

    @property
    def rescue(self) -> str:
        """Nothing, because all data is on disk."""
        return ""

    @property
    def url(self) -> str | None:
        """None, because the user starts the tracker's pages."""
        return None


def in_one_line(error: Exception) -> str:
    """Join the first lines of a message. They name the fault and its place; the rest explains the use of a library."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3]) or type(error).__name__
