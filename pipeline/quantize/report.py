"""Reports the account of rounding: figures of each layer and of the whole model, and two lines for the user."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.checkpoints.notes import Note
from pipeline.config import QuantizeConfig
from pipeline.export.account import Figures, describe, describe_blocks, stacks_of_layers, total
from pipeline.quantize.codes import Coverage
from pipeline.runs.console import say, warn
from pipeline.runs.tracking import log_metrics


def account_for(notes: Sequence[Note], directory: Path, method: str) -> Figures:
    """Log the figures of each layer and of the whole model, tell the user, and return those of the whole model.

    Args:
        notes: notes of pieces. The notes on stacks of experts have `layer` and `sums` (see `Account`).
        directory: directory of the stage.
        method: value of quantize.method.
    """
    layers = stacks_of_layers(notes)
    for layer, stacks in layers.items():
        log_metrics(directory, {"layer": layer, **total(note["sums"] for note in stacks).figures()})
    whole = total(note["sums"] for stacks in layers.values() for note in stacks).figures()
    log_metrics(directory, whole)
    _tell(whole, method)
    return whole


def fallback_for(layers: Sequence[Coverage], directory: Path, settings: QuantizeConfig) -> dict[str, int]:
    """Log how many experts of each layer GPTQ did not round, tell the user, and return the counts of the whole model.

    Args:
        layers: for each layer, the number of `tokens` of each expert, and the experts in `fallback`.
        directory: directory of the stage.
        settings: section `quantize` of the configuration.
    """
    whole = dict.fromkeys(("experts", "fallback_experts", "without_tokens"), 0)
    for number, layer in enumerate(layers):
        tokens, fallback = layer["tokens"], layer["fallback"]
        counts = {"experts": len(tokens), "fallback_experts": len(fallback), "without_tokens": tokens.count(0)}
        log_metrics(directory, {"layer": number, **counts, "fewest_tokens": min(tokens), "most_tokens": max(tokens)})
        whole = {name: whole[name] + count for name, count in counts.items()}
    log_metrics(directory, whole)
    rounded = whole["experts"] - whole["fallback_experts"]
    say("quantize", f"gptq rounded {rounded} of {whole['experts']} experts")
    if whole["fallback_experts"]:
        warn(
            "quantize",
            f"{whole['fallback_experts']} of {whole['experts']} experts had fewer than {settings.tokens_per_input:g}"
            f" calibration tokens per input dimension ({whole['without_tokens']} had none). They were rounded by"
            f" quantize.fallback={settings.fallback.name}. More examples may help (quantize.calibration_samples).",
        )
    return whole


def _tell(whole: Figures, method: str) -> None:
    say("quantize", describe(whole, f"{method} rounding"))
    adjusted = f", {whole['adjusted_blocks']} blocks rounded again" if whole["adjusted_blocks"] else ""
    say("quantize", f"{whole['changed_codes']:.2%} of the 4-bit values and {describe_blocks(whole)}{adjusted}")
