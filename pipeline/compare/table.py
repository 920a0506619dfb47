"""Make the tables of the report, for the terminal, Markdown and HTML.

A figure without an entry in _FORMS gets a column under its own name, so new scorers need no edit here.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as TerminalTable

from pipeline.compare import digits
from pipeline.compare.digits import size
from pipeline.compare.names import figure_name
from pipeline.compare.rows import Row

_WIDTH = 200  # characters in a line, if the output is not a terminal
_TITLE_WIDTH = 12  # characters in a line of a column's title
_NONE = "–"
_REFERENCE = "reference"
_PARTS = ("_low", "_high", "_decided", "_undecided")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: heading of the column.
        show: function that returns the text of the cell in a row.
        field: name of the column in the JSON lines of the table, if it differs from the title.
        rank: function that returns a number, the lower the better, or None if the row has no value. If `rank` is None,
            no value of the column is better than another.
    """

    title: str
    show: Callable[[Row], str]
    field: str = ""
    rank: Callable[[Row], float | None] | None = None


@dataclass(frozen=True)
class Table:
    """A table with a line for each row of the report.

    Attributes:
        title: heading of the table.
        columns: columns of the table.
        caption: text below the table that explains it.
    """

    title: str
    columns: list[Column]
    caption: str = ""

    def titles(self) -> list[str]:
        """Return the titles of the columns."""
        return [column.title for column in self.columns]

    def fields(self) -> list[str]:
        """Return the names of the columns in the JSON lines of the table."""
        return [column.field or column.title for column in self.columns]

    def cells(self, rows: Iterable[Row]) -> list[list[str]]:
        """Return the cells, line by line."""
        return [[column.show(row) for column in self.columns] for row in rows]

    def best(self, rows: list[Row]) -> list[list[bool]]:
        """Return whether each cell has the best value of its column. Values that are equal as printed are equally good.

        A column whose values are all equally good has no best value.
        """
        marks = [_best_of(column, rows) for column in self.columns]
        return [list(line) for line in zip(*marks, strict=True)]


def _best_of(column: Column, rows: list[Row]) -> list[bool]:
    found = [None if column.rank is None else column.rank(row) for row in rows]
    ranks = [(rank, row) for rank, row in zip(found, rows, strict=True) if rank is not None and math.isfinite(rank)]
    if len(ranks) < 2:
        return [False] * len(rows)
    _, winner = min(ranks, key=lambda each: each[0])
    marks = [
        rank is not None and column.show(row) == column.show(winner) for rank, row in zip(found, rows, strict=True)
    ]
    return marks if sum(marks) < len(ranks) else [False] * len(rows)


@dataclass(frozen=True)
class _Form:
    """How a figure is shown.

    Attributes:
        title: title of its column.
        show: function that formats a value. A figure with an interval is written by `digits.show`.
        is_share: whether the values are shares from 0 to 1, which are shown in percent.
        best: "low" or "high" if low or high values are better, or "".
    """

    title: str
    show: Callable[[float], str] = digits.significant
    is_share: bool = False
    best: str = ""

    def cell(self, row: Row, figure: str) -> str:
        """Return the text of a figure in a row, with its interval if there is one. A missing figure is a dash."""
        found = [row.figures.get(f"{figure}{part}") for part in ("", "_low", "_high")]
        value, low, high = (None if each is None else each * (100 if self.is_share else 1) for each in found)
        if value is None:
            return _NONE
        unit = " %" if self.is_share else ""
        return f"{self.show(value)}{unit}" if low is None or high is None else digits.show(value, low, high, unit)


_FORMS: dict[str, _Form] = {
    "validation_loss": _Form("validation loss", "{:.3f}".format, best="low"),
    "loss_change": _Form("loss against SFT", "{:+.1f}".format, is_share=True),
    "perplexity": _Form("perplexity", best="low"),
    "weight_bytes": _Form("size on disk", size, best="low"),
    "served_bytes": _Form("size when served", size, best="low"),
    "relative_weight_error": _Form("relative weight error", is_share=True),
    "snr_db": _Form("SNR (dB)", "{:.1f}".format),
    "flipped_codes": _Form("flipped codes", is_share=True),
    "kl_divergence": _Form("KL divergence (nats)", best="low"),
    "top1_agreement": _Form("top-1 agreement", is_share=True, best="high"),
}
"""Figure -> how it is shown."""

_FIELDS = {"kl_divergence": "KL (nats)", "top1_agreement": "same first token"}
"""Figure -> the name of its column in the JSON lines, if it differs from the title."""

_QUALITY = ("validation_loss", "loss_change", "kl_divergence", "top1_agreement")
_AGAINST_REFERENCE = ("kl_divergence", "top1_agreement")
_SIZE = ("served_bytes",)
_NOT_SHOWN = ("supervised_tokens", "validation_loss_all_tokens")


def make_tables(rows: list[Row], reference: str | None) -> list[Table]:
    """Make the table of the models, and the table of all other figures if there are any."""
    whole = list(dict.fromkeys(name for row in rows for name in row.figures if "/" not in name))
    rates = [name for name in whole if is_rate(name, rows)]
    first = [_column(name, reference) for name in _QUALITY if name in whole]
    last = [_column(name, reference) for name in _SIZE if name in whole]
    columns = [_MODEL, *first, *map(_rate_column, rates), *last, _TIME, _MEMORY, _ROLE]
    shown = (*_QUALITY, *_SIZE, *_NOT_SHOWN, *rates)
    others = [name for name in whole if name not in shown and not _is_part(name, whole)]
    rest = [Table("Other figures", [_MODEL, *(_column(name, reference) for name in others)], _OTHERS_CAPTION)]
    return [Table("Models", columns, _caption(rows, reference)), *(rest if others else [])]


def make_rounding_table(rows: list[Row]) -> Table | None:
    """Make the table of the accounts of rounding. Return None if no model has one."""
    if all(row.rounding is None for row in rows):
        return None
    method = Column("rounding", lambda row: _NONE if row.rounding is None else row.rounding.method)
    return Table("What rounding kept", [_MODEL, _ROLE, method, *map(_account_column, _ACCOUNT)], _ACCOUNT_CAPTION)


def _account_column(name: str) -> Column:
    def show(row: Row) -> str:
        value = None if row.rounding is None else row.rounding.account[name]
        return _NONE if value is None else f"{digits.significant(100 * value)} %"

    return Column(_ACCOUNT[name], show)


def is_rate(name: str, rows: list[Row]) -> bool:
    """Return whether a figure is a pass rate. Only pass rates have a count of decided answers."""
    return any(f"{name}_decided" in row.figures for row in rows)


def _is_part(name: str, whole: list[str]) -> bool:
    """Return whether a figure is a bound or a count that belongs to another figure."""
    return any(name.endswith(part) and _is_figure(name.removesuffix(part), whole) for part in _PARTS)


def _is_figure(name: str, whole: list[str]) -> bool:
    return name in whole or f"{name}_decided" in whole


_ACCOUNT = {
    "relative_change": "relative change",
    "kept": "kept",
    "noise": "noise",
    "changed_codes": "codes moved",
    "changed_scales": "scales moved",
}
"""Figure of the account -> the title of its column."""

_ACCOUNT_CAPTION = (
    "Relative change: norm(D) / norm(B). D is the change of the experts by training, and B are the experts of the"
    " original. Kept: share of D that is left after rounding, on average. Noise: norm of the rest, divided by the norm"
    " of the weights. Codes moved, scales moved: shares of 4-bit values and of block scales that differ from the"
    " original's. The weights before rounding are the model's own. If `quantize` wrote rounded experts, later rounding"
    " changes nothing, and only the row of PTQ shows the cost. QAT has the figures of its export."
)


def _show_time(row: Row) -> str:
    return _NONE if row.seconds is None else digits.duration(row.seconds)


def _show_memory(row: Row) -> str:
    return _NONE if row.peak_bytes is None else f"{size(row.peak_bytes)}{' GPU' if row.is_gpu_memory else ''}"


_MODEL = Column("model", lambda row: row.title)
_ROLE = Column("made by", lambda row: _NONE if row.title.lower().endswith(row.role.lower()) else row.role)
_TIME = Column("time", _show_time)
_MEMORY = Column("most memory", _show_memory)
_OTHERS_CAPTION = (
    "Size on disk: the files that the model needs, with training's data type for models that are not exported. Relative"
    " weight error: norm(W - R) / norm(R). W are the experts' weights in the forward pass, and R are the weights of the"
    " reference. SNR: the same in decibels. Flipped codes: share of the 4-bit values that differ from the reference's"
    " after rounding."
)


def _column(name: str, reference: str | None) -> Column:
    form = _FORMS.get(name, _Form(figure_name(name)))

    def show(row: Row) -> str:
        text = form.cell(row, name)
        is_own = name in _AGAINST_REFERENCE and row.model == reference
        return _REFERENCE if is_own and text == _NONE else text

    return Column(form.title, show, _FIELDS.get(name, ""), _rank(name, form.best))


def _rank(name: str, best: str) -> Callable[[Row], float | None] | None:
    if not best:
        return None
    sign = -1.0 if best == "high" else 1.0
    return lambda row: sign * row.figures[name] if name in row.figures else None


def _rate_column(name: str) -> Column:
    return Column(figure_name(name), lambda row: show_rate(row, name), "", _rank(name, "high"))


def show_rate(row: Row, name: str) -> str:
    """Show a pass rate with its interval and the number of decided answers."""
    value, low, high, decided = (row.figures.get(f"{name}{part}") for part in ("", "_low", "_high", "_decided"))
    if value is None or low is None or high is None:
        return _NONE if decided is None else "undecided"
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {decided or 0:.0f}"


def _caption(rows: list[Row], reference: str | None) -> str:
    told = ["Best values are marked; a difference may still be not significant (see Tests). Brackets: 95 % interval."]
    tokens = next((row.figures["supervised_tokens"] for row in rows if "supervised_tokens" in row.figures), None)
    if tokens is None or reference is None:
        told.append("Loss and weights of models on servers are unknown.")
    else:
        told.append(
            f"Loss over {tokens:.0f} supervised validation tokens; only its mean is stored, so it has no interval."
        )
        told.append("KL divergence and top-1 agreement compare the predicted tokens with the reference's.")
    if any(is_rate(name, rows) for row in rows for name in row.figures):
        told.append("A pass rate is the share of decided answers that passed, with Wilson's interval.")
    told.append(
        "Size when served: the weights in memory. An export is served as it is. Other models are served with experts in"
        " their 4-bit format, or in BF16 if they round nothing. Time and memory: the stage that made the model; a"
        " control has the sum of its stages. Memory is the main process's peak, on its GPU if it has one."
    )
    return " ".join(told)


# --- output -----------------------------------------------------------------------------------------------------------


def to_markdown(table: Table, rows: list[Row]) -> str:
    """Write the table in Markdown, with its best values in bold and its caption below."""
    cells = [
        [f"**{_escape(cell)}**" if is_best else _escape(cell) for cell, is_best in zip(line, marks, strict=True)]
        for line, marks in zip(table.cells(rows), table.best(rows), strict=True)
    ]
    lines = [[_escape(title) for title in table.titles()], ["---"] * len(table.columns), *cells]
    drawn = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{drawn}\n\n{table.caption}\n" if table.caption else f"{drawn}\n"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def show(table: Table, rows: list[Row]) -> None:
    """Print the table. Its width is at most the terminal's width, or _WIDTH if there is no terminal."""
    drawn = TerminalTable(caption=table.caption or None, caption_justify="left")
    for i, column in enumerate(table.columns):
        title = textwrap.fill(column.title, _TITLE_WIDTH)
        is_name = i == 0
        drawn.add_column(title, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for line in table.cells(rows):
        drawn.add_row(*line)
    console = Console()
    console.print(drawn) if console.is_terminal else Console(width=_WIDTH).print(drawn)
