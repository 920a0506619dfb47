"""The comparison as a table: columns are data, drawn for the terminal and as Markdown."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A column: its title and how a row's figures are shown in it."""

    title: str
    show: Callable[[dict[str, Any]], str]


def _figure(name: str, form: Callable[[Any], str]) -> Callable[[dict[str, Any]], str]:
    """A figure as `form` writes it; a model on a server has not all of them."""
    return lambda row: "–" if row.get(name) is None else form(row[name])


def _megabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3f} MB"


COLUMNS = (
    Column("model", lambda row: row["model"]),
    Column("validation loss", _figure("validation_loss", "{:.4f}".format)),
    Column("against sft", _figure("loss_change", lambda share: f"{100 * share:+.2f} %")),
    Column("perplexity", _figure("perplexity", "{:.3f}".format)),
    Column("size on disk", _figure("weight_bytes", _megabytes)),
    Column("relative weight error", _figure("relative_weight_error", lambda share: f"{100 * share:.3f} %")),
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| " + " | ".join(column.title for column in COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(column.show(row) for column in COLUMNS) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def show(rows: list[dict[str, Any]], caption: str) -> None:
    """Print the table on the terminal."""
    table = Table(caption=caption, caption_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column.title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(column.show(row) for column in COLUMNS))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=120).print(table)
