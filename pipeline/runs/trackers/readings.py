"""Convert lines of metrics.jsonl to readings: one key for each figure of each model, the same in all trackers."""

import json
import re
from collections.abc import Iterator, Mapping

from pipeline.runs.trackers.tracker import Reading

_SERIES = {"layer": "layers", "candidate": "candidates"}
_PARTS = ("section", "check")
_NOT_FIGURES = {"time", "model", "step", *_SERIES, *_PARTS}
_NOT_IN_KEYS = re.compile(r"[^-\w./]", re.ASCII)
_LONGEST_TEXT = 4000  # MLflow allows 8000 characters in a tag


def read_line(line: Mapping[str, object], stage: str, model: str | None = None) -> Reading:
    """Convert a line of metrics.jsonl.

    Keys are `<model>/<figure>`. If a line names no model, the stage's name stands in its place. Lines of a section or a
    check have keys such as `doctor/<section>/<figure>`. Lines of one layer or candidate have keys such as
    `export/layers/<figure>`, and the number of the layer is the step. Values that are None are left out.

    Args:
        line: the line, with `time`.
        stage: name of the stage.
        model: name of the model, if it is not the one in the line.
    """
    parts = [str(line[name]).replace("/", "_") for name in _PARTS if name in line]
    series = [plural for name, plural in _SERIES.items() if name in line]
    prefix = "/".join([str(model or line.get("model") or stage), *parts, *series])
    numbers, texts = split({name: value for name, value in line.items() if name not in _NOT_FIGURES}, prefix)
    time = line["time"]
    assert isinstance(time, float)
    return Reading(time, _step(line), numbers, texts)


def split(values: Mapping[str, object], prefix: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers and the texts among nested values, keyed by `<prefix>/<name>`. Lists become JSON texts."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in _flatten(values, prefix):
        if isinstance(value, bool | int | float):
            numbers[key] = float(value)
        elif value is not None:
            texts[key] = (value if isinstance(value, str) else json.dumps(value))[:_LONGEST_TEXT]
    return numbers, texts


def _flatten(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        key = _NOT_IN_KEYS.sub("_", f"{prefix}/{name}")
        if isinstance(value, Mapping):
            yield from _flatten(value, key)
        else:
            yield key, value


def _step(line: Mapping[str, object]) -> int | None:
    return next((value for name in ("step", *_SERIES) if isinstance(value := line.get(name), int)), None)
