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


def _megabytes(row: dict[str, Any]) -> str:
    size = row["weight_bytes"]
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3f} MB"


def _change(row: dict[str, Any]) -> str:
    change = row["loss_change"]
    return "–" if change is None else f"{100 * change:+.2f} %"


COLUMNS = (
    Column("model", lambda row: row["model"]),
    Column("validation loss", lambda row: f"{row['validation_loss']:.4f}"),
    Column("against sft", _change),
    Column("perplexity", lambda row: f"{row['perplexity']:.3f}"),
    Column("size on disk", _megabytes),
    Column("relative weight error", lambda row: f"{100 * row['relative_weight_error']:.3f} %"),
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
