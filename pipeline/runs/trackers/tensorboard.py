"""TensorBoard: event files in <run_dir>/tensorboard/<stage> or <stage>/<part>, written by torch's SummaryWriter."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.runs.trackers.tracker import Hint, Item, OnDisk, Reading, TrackedStage

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_DIRECTORY = "tensorboard"
_MOST_ROWS = 100  # TensorBoard shows a table as one text


class TensorBoard(OnDisk):
    """A stage as one run of TensorBoard. TensorBoard stores no files other than images."""

    title = "TensorBoard"
    failures: tuple[type[Exception], ...] = (OSError,)  # errors of the thread that writes are raised by the next call

    def __init__(self, stage: TrackedStage) -> None:
        self._stage = stage
        self._all = stage.directory / _DIRECTORY
        self._directory = self._all / stage.stage / (stage.part or "")
        self._opened: SummaryWriter | None = None
        self._held = {"tags": ", ".join(stage.tags)}  # texts until the first line of metrics
        self._add_json("config", stage.config)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"tracking=tensorboard: cannot write {self._directory} ({error.strerror}). Set run_dir to a writable"
                " place, or use tracking=none."
            ) from error

    def _writer(self, step: int | None = None) -> "SummaryWriter":
        """Return the writer. The first call gives the step from which this file replaces the files of earlier tries."""
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(str(self._directory), purge_step=step or 0)
            for name, text in self._held.items():
                self._opened.add_text(name, text)
        return self._opened

    @property
    def hint(self) -> Hint | None:
        """The command that shows all stages."""
        return Hint("to see the curves", f"tensorboard --logdir {shlex.quote(str(self._all))}")

    def log(self, reading: Reading) -> None:
        """Add scalars and texts."""
        writer = self._writer(reading.step)
        for key, number in reading.numbers.items():
            writer.add_scalar(key, number, reading.step, walltime=reading.time)
        for key, text in reading.texts.items():
            writer.add_text(key, text, reading.step, walltime=reading.time)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add the first rows as a Markdown table."""
        lines = [columns, ["---"] * len(columns), *rows[:_MOST_ROWS]]
        if len(rows) > _MOST_ROWS:
            lines.append([f"({len(rows) - _MOST_ROWS} more rows)", *[""] * (len(columns) - 1)])
        self._add_text(f"tables/{name}", "\n".join(_row(line) for line in lines))

    def log_media(self, images: Mapping[str, Path], pages: Mapping[str, Path]) -> None:
        """Add the images as `plots/<name>`. TensorBoard cannot show pages."""
        import numpy as np
        from PIL import Image

        for name, path in images.items():
            with Image.open(path) as image:
                self._writer().add_image(f"plots/{name}", np.asarray(image.convert("RGB")), dataformats="HWC")

    def use(self, item: Item) -> None:
        """Add the description as the text `inputs/<name>`."""
        self._add_json(f"inputs/{item.name}", item.description)

    def make(self, item: Item) -> None:
        """Add the description as the text `outputs/<name>`."""
        self._add_json(f"outputs/{item.name}", item.description)

    def summarize(self, figures: Mapping[str, float]) -> None:
        """Add the figures as a table, because a scalar without a step would be a point of a curve."""
        self.log_table("summary", ["figure", "value"], list(figures.items()))

    def finish(self, succeeded: bool) -> None:
        """Write everything to disk."""
        writer = self._writer()
        writer.add_text("status", "complete" if succeeded else "failed")
        writer.close()

    def _add_json(self, name: str, value: Mapping[str, object]) -> None:
        self._add_text(name, f"```json\n{json.dumps(value, indent=2, sort_keys=True)}\n```")

    def _add_text(self, name: str, text: str) -> None:
        if self._opened is None:
            self._held[name] = text
        else:
            self._opened.add_text(name, text)


def _row(cells: Sequence[object]) -> str:
    plain = [str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells]
    return f"| {' | '.join(plain)} |"
