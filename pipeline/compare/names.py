"""The names that readers of the report see, in the words of the field: models, figures and paths."""

from pathlib import Path

from pipeline.config.hub_ids import is_hub_id
from pipeline.runs.artifacts import EVALUATED_STAGES

ORDER = tuple(stage.name for stage in EVALUATED_STAGES)
UPCAST, SFT, PTQ, QAT, EXPORT = ORDER

MODELS = {UPCAST: "Original", SFT: "SFT", PTQ: "PTQ", QAT: "QAT", EXPORT: "Exported"}
"""Stage -> the name of its model."""

_FIGURES = {
    "kl_divergence": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "snr_db": "signal-to-noise ratio (dB)",
    "flipped_codes": "flipped codes",
}


def figure_name(figure: str) -> str:
    """Return the name of a figure, as in a sentence."""
    return _FIGURES.get(figure, figure.replace("_", " "))


def figure_title(figure: str) -> str:
    """Return the name of a figure with a capital letter."""
    name = figure_name(figure)
    return name[:1].upper() + name[1:]


def without_directory(path: str) -> str:
    """Return the last part of a path on this machine. Ids on the Hub and URLs stay as they are."""
    return path if "://" in path or is_hub_id(path, needs_owner=False) else Path(path).name


def is_local(name: str) -> bool:
    """Return whether the name of a model is a path on this machine. Relative paths below here tell nothing of it."""
    return name.startswith(("/", "~", "."))


def distinct_endings(paths: list[Path]) -> dict[Path, str]:
    """Name paths by their last parts. If two are equal, name all paths by their parts below the common parent."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return dict(zip(paths, names, strict=True))
    parts = [path.parts for path in paths]
    shared = next((i for i, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), min(map(len, parts)))
    return {path: "/".join(path.parts[shared:]) or path.name for path in paths}
