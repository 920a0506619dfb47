"""The figures of models as tables: columns are data, drawn for the terminal, as Markdown and as HTML.

Figures that nobody has described here get a column of their own, under the name that they were measured by.
"""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as TerminalTable

from pipeline.compare.findings import size
from pipeline.compare.rows import Row

_WIDTH = 200  # without a terminal
_TITLE_WIDTH = 12  # of a line
_NONE = "–"
_PARTS = ("_low", "_high", "_decided", "_undecided")


@dataclass(frozen=True)
class Column:
    """A column: its title and how a row is shown in it."""

    title: str
    show: Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """Some columns of all rows, and what must be known to read them."""

    title: str
    columns: list[Column]
    caption: str = ""

    def titles(self) -> list[str]:
        """Of the columns."""
        return [column.title for column in self.columns]

    def cells(self, rows: Iterable[Row]) -> list[list[str]]:
        """What stands in it, row by row."""
        return [[column.show(row) for column in self.columns] for row in rows]


def _figure(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    """A figure as `form` writes it, with its interval if it has one; not every model has every figure."""

    def show(row: Row) -> str:
        value, low, high = (row.figures.get(f"{name}{part}") for part in ("", "_low", "_high"))
        if value is None:
            return _NONE
        return form(value) if low is None or high is None else f"{form(value)} [{form(low)}, {form(high)}]"

    return show


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"


_FORMS: dict[str, tuple[str, Callable[[float], str]]] = {
    "validation_loss": ("validation loss", "{:.4f}".format),
    "loss_change": ("against sft", lambda share: f"{100 * share:+.2f} %"),
    "perplexity": ("perplexity", "{:.3f}".format),
    "weight_bytes": ("size on disk", size),
    "served_bytes": ("size served", size),
    "relative_weight_error": ("relative weight error", _percent),
    "snr_db": ("SNR (dB)", "{:.2f}".format),
    "flipped_codes": ("flipped codes", _percent),
    "kl_divergence": ("KL (nats)", "{:.5f}".format),
    "top1_agreement": ("same first token", _percent),
}
"""Figure -> its title and form."""

_FIRST = ("validation_loss", "loss_change", "perplexity", "weight_bytes", "served_bytes", "relative_weight_error")
_NOT_SHOWN = ("supervised_tokens", "validation_loss_all_tokens")


def tables(rows: list[Row], reference: str | None) -> list[Table]:
    """The tables of a report: what was lost and what it costs, pass rates, and whatever else was measured."""
    whole = list(dict.fromkeys(name for row in rows for name in row.figures if "/" not in name))
    rates = [name for name in whole if is_rate(name, rows)]
    others = [name for name in whole if name not in (*_FIRST, *_NOT_SHOWN, *rates) and not _is_part(name, whole)]
    first = [name for name in _FIRST if name in whole or name == "validation_loss"]
    found = [Table("Loss and size", [_MODEL, _ROLE, *map(_column, first)], _caption(rows, reference))]
    if rates:
        found.append(Table("Pass rates", [_MODEL, *(_rate(name) for name in rates)], _RATES_CAPTION))
    if others:
        found.append(Table("Other figures", [_MODEL, *map(_column, others)]))
    return found


def costs(rows: list[Row]) -> Table:
    """What the stages took; those that another program made, or another run, are not known."""
    columns = [
        Column("time", lambda row: _NONE if row.seconds is None else f"{row.seconds:.1f} s"),
        Column("most memory", lambda row: _NONE if row.peak_bytes is None else size(row.peak_bytes)),
    ]
    caption = "Of the stage that made the model; memory of the main process, on its GPU if it has one."
    return Table("Cost", [_MODEL, _ROLE, *columns], caption)


def is_rate(name: str, rows: list[Row]) -> bool:
    """Whether a figure is a pass rate, that is, has the number of answers that it rests on."""
    return any(f"{name}_decided" in row.figures for row in rows)


def _is_part(name: str, whole: list[str]) -> bool:
    """Whether a figure belongs to another one, as its bound or count."""
    return any(name.endswith(part) and _is_named(name.removesuffix(part), whole) for part in _PARTS)


def _is_named(name: str, whole: list[str]) -> bool:
    return name in whole or f"{name}_decided" in whole


_MODEL = Column("model", lambda row: row.title)
_ROLE = Column("what it is", lambda row: row.role if row.role != row.model else _NONE)
_RATES_CAPTION = (
    "Share of answers that passed, with Wilson's 95 % interval, of those that could be decided; what could not be is"
    " in no rate."
)


def _column(name: str) -> Column:
    title, form = _FORMS.get(name, (name.replace("_", " "), "{:.4g}".format))
    return Column(title, _figure(name, form))


def _rate(name: str) -> Column:
    return Column(name.replace("_", " "), lambda row: rate(row, name))


def rate(row: Row, name: str, group: str = "") -> str:
    """A pass rate with its interval and what it rests on."""
    value, low, high, decided = (row.figures.get(f"{name}{part}{group}") for part in ("", "_low", "_high", "_decided"))
    if value is None or low is None or high is None:
        return _NONE if decided is None else "undecided"
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {decided or 0:.0f}"


def _caption(rows: list[Row], reference: str | None) -> str:
    tokens = next((row.figures["supervised_tokens"] for row in rows if "supervised_tokens" in row.figures), None)
    if tokens is None or reference is None:
        return "Of models on servers neither loss nor weights are known."
    return (
        f"Loss over {tokens:.0f} supervised validation tokens. Relative weight error: of the experts' weights as the"
        f" forward pass uses them, against {reference}. Size served: weights in memory, in the 4-bit format that the"
        " model rounds to, or BF16."
    )


# --- drawn -----------------------------------------------------------------------------------------------------------


def markdown(table: Table, rows: list[Row]) -> str:
    """The table in Markdown, with its caption below."""
    lines = [table.titles(), ["---"] * len(table.columns), *table.cells(rows)]
    drawn = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{drawn}\n\n{table.caption}\n" if table.caption else f"{drawn}\n"


def show(table: Table, rows: list[Row]) -> None:
    """Print the table on the terminal; without one, as wide as it takes."""
    drawn = TerminalTable(caption=table.caption or None, caption_justify="left")
    for i, column in enumerate(table.columns):
        title = textwrap.fill(column.title, _TITLE_WIDTH)
        is_name = i == 0
        drawn.add_column(title, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for line in table.cells(rows):
        drawn.add_row(*line)
    console = Console()
    console.print(drawn) if console.is_terminal else Console(width=_WIDTH).print(drawn)
