"""Reports the account of rounding: figures of each layer and of the whole model, and two lines for the user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.quantize import account
from pipeline.runs.console import say
from pipeline.runs.tracking import log_metrics

Figures = dict[str, float | None]


def account_for(notes: Sequence[dict[str, Any]], directory: Path, method: str) -> Figures:
    """Log the figures of each layer and of the whole model, tell the user, and return those of the whole model.

    Args:
        notes: notes of pieces. The notes on stacks of experts have `layer` and `sums` (see `Account`).
        directory: directory of the stage.
        method: value of quantize.method.
    """
    experts = [note for note in notes if "sums" in note]
    for layer in sorted({note["layer"] for note in experts}):
        of_layer = account.total(note["sums"] for note in experts if note["layer"] == layer)
        log_metrics(directory, {"layer": layer, **of_layer.figures()})
    whole = account.total(note["sums"] for note in experts).figures()
    log_metrics(directory, whole)
    _tell(whole, method)
    return whole


def _tell(whole: Figures, method: str) -> None:
    kept = whole["kept"]
    change = (
        "training changed no expert"
        if kept is None
        else (
            f"training changed the experts by {whole['relative_change']:.2%}; {method} rounding keeps {kept:.1%} of the"
            " change on average"
        )
    )
    say("quantize", f"{change}, and adds {whole['noise']:.2%} noise")
    adjusted = f", {whole['adjusted_blocks']} blocks rounded again" if whole["adjusted_blocks"] else ""
    say(
        "quantize",
        f"{whole['changed_codes']:.2%} of the 4-bit values and {whole['changed_scales']:.2%} of the scales differ from"
        f" the base's ({whole['scales_up']:.2%} larger, {whole['scales_down']:.2%} smaller); {whole['clipped_values']}"
        f" values clipped{adjusted}",
    )
