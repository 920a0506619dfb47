"""Make the tables of the report, for the terminal, Markdown and HTML.

A figure without an entry in _FORMS gets a column under its own name, so new scorers need no edit here.
"""

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as TerminalTable

from pipeline.compare.findings import size
from pipeline.compare.rows import Row

_WIDTH = 200  # characters in a line, if the output is not a terminal
_TITLE_WIDTH = 12  # characters in a line of a column's title
_NONE = "–"
_PARTS = ("_low", "_high", "_decided", "_undecided")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: heading of the column.
        show: function that returns the text of the cell in a row.
        field: name of the column in the JSON lines of the table, if it differs from the title.
    """

    title: str
    show: Callable[[Row], str]
    field: str = ""


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


def _show_figure(name: str, form: Callable[[float], str]) -> Callable[[Row], str]:
    """Make the function that shows one figure of a row. `form` formats the value and, if there is one, the interval.

    A model that lacks the figure gets a dash.
    """

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
    "kl_divergence": ("KL divergence (nats)", "{:.5f}".format),
    "top1_agreement": ("top-1 agreement", _percent),
}
"""Figure -> the title of its column, and the function that formats its values."""

_FIELDS = {"kl_divergence": "KL (nats)", "top1_agreement": "same first token"}
"""Figure -> the name of its column in the JSON lines, if it differs from the title."""

_FIRST = ("validation_loss", "loss_change", "perplexity", "weight_bytes", "served_bytes", "relative_weight_error")
_NOT_SHOWN = ("supervised_tokens", "validation_loss_all_tokens")


def make_tables(rows: list[Row], reference: str | None) -> list[Table]:
    """Make the tables of the report: loss and size, pass rates, and all other figures."""
    whole = list(dict.fromkeys(name for row in rows for name in row.figures if "/" not in name))
    rates = [name for name in whole if is_rate(name, rows)]
    others = [name for name in whole if name not in (*_FIRST, *_NOT_SHOWN, *rates) and not _is_part(name, whole)]
    first = [name for name in _FIRST if name in whole or name == "validation_loss"]
    found = [Table("Loss and size", [_MODEL, _ROLE, *map(_column, first)], _caption(rows, reference))]
    if rates:
        found.append(Table("Pass rates", [_MODEL, *(_rate_column(name) for name in rates)], _RATES_CAPTION))
    if others:
        found.append(Table("Other figures", [_MODEL, *map(_column, others)]))
    return found


def make_cost_table(rows: list[Row]) -> Table:
    """Make the table of time and memory. If no stage made a model, its cost is unknown."""
    columns = [
        Column("time", lambda row: _NONE if row.seconds is None else f"{row.seconds:.1f} s"),
        Column("most memory", lambda row: _NONE if row.peak_bytes is None else size(row.peak_bytes)),
    ]
    caption = (
        "Cost of the stage that made the model. A control has the sum of its own stages. Memory is the main process's"
        " peak, on its GPU if it has one."
    )
    return Table("Cost", [_MODEL, _ROLE, *columns], caption)


def make_rounding_table(rows: list[Row]) -> Table | None:
    """Make the table of the accounts of rounding. Return None if no model has one."""
    if all(row.rounding is None for row in rows):
        return None
    method = Column("rounding", lambda row: _NONE if row.rounding is None else row.rounding.method)
    return Table("What rounding kept", [_MODEL, _ROLE, method, *map(_account_column, _ACCOUNT)], _ACCOUNT_CAPTION)


def _account_column(name: str) -> Column:
    def show(row: Row) -> str:
        value = None if row.rounding is None else row.rounding.account[name]
        return _NONE if value is None else f"{100 * value:.2f} %"

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
    " changes nothing, and only the row of `quantize` shows the cost. A QAT model has the figures of its export."
)

_MODEL = Column("model", lambda row: row.title)
_ROLE = Column("what it is", lambda row: row.role if row.role != row.model else _NONE)
_RATES_CAPTION = (
    "Share of decided answers that passed, with Wilson's 95 % interval. Answers that could not be decided are not"
    " counted."
)


def _column(name: str) -> Column:
    title, form = _FORMS.get(name, (name.replace("_", " "), "{:.4g}".format))
    return Column(title, _show_figure(name, form), _FIELDS.get(name, ""))


def _rate_column(name: str) -> Column:
    return Column(name.replace("_", " "), lambda row: show_rate(row, name))


def show_rate(row: Row, name: str) -> str:
    """Show a pass rate with its interval and the number of decided answers."""
    value, low, high, decided = (row.figures.get(f"{name}{part}") for part in ("", "_low", "_high", "_decided"))
    if value is None or low is None or high is None:
        return _NONE if decided is None else "undecided"
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] of {decided or 0:.0f}"


def _caption(rows: list[Row], reference: str | None) -> str:
    tokens = next((row.figures["supervised_tokens"] for row in rows if "supervised_tokens" in row.figures), None)
    if tokens is None or reference is None:
        return "Loss and weights of models on servers are unknown."
    return (
        f"Loss over {tokens:.0f} supervised validation tokens. Relative weight error: norm(W - R) / norm(R). W are the"
        f" experts' weights in the forward pass, and R are the weights of {reference}. Size served: size of the weights"
        " in memory. Experts are served in their 4-bit format if the model rounds them, else in BF16. The original's"
        " experts are served in the released format."
    )


# --- output -----------------------------------------------------------------------------------------------------------


def to_markdown(table: Table, rows: list[Row]) -> str:
    """Write the table in Markdown, with its caption below."""
    lines = [table.titles(), ["---"] * len(table.columns), *table.cells(rows)]
    drawn = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{drawn}\n\n{table.caption}\n" if table.caption else f"{drawn}\n"


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
