"""Keeps the figures of each seed and cell, so that a killed run goes on, and collects complete seeds."""

import json
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.recording import name_processor, write_record
from scripts.rounding_study import models
from scripts.rounding_study.cells import Cell, Seed
from scripts.rounding_study.settings import Settings

_LIBRARIES = ("torch", "transformers", "nvidia-modelopt", "peft")
_DIGITS = 6


def run_seed(number: int, settings: Settings, directory: Path, *, most_cells: int | None = None) -> None:
    """Compute the missing cells of a seed, and store each cell as soon as it is known.

    Args:
        number: the seed.
        settings: settings of the study.
        directory: directory of the seed's models and figures.
        most_cells: stop after this many cells. None computes all.

    Raises:
        ValueError: the directory has figures of other settings.
    """
    path = _file(directory, number)
    cells = list(Seed(number, settings, path.parent).cells())
    record = _load(path, settings)
    for name, work in _missing(cells, record)[:most_cells]:
        start = time.process_time()
        record["cells"][name] = {key: _shorten(value) for key, value in work().items()}
        record["cpu_seconds"] += time.process_time() - start
        record["complete"] = not _missing(cells, record)
        write_record(path, record)
        print(f"seed {number}: {name} {json.dumps(record['cells'][name])}", flush=True)


def collect(directory: Path, results: Path, settings: Settings) -> list[str]:
    """Write all complete seeds into the results file, with those that it has. Return the numbers of the seeds.

    Raises:
        ValueError: a file has figures of other settings.
    """
    old: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {"seeds": {}}
    if old["seeds"]:
        _raise_unless_same(old["settings"], settings, results)
    seeds = dict(old["seeds"])
    for path in sorted(directory.glob("seed*/cells.json")):
        record = _load(path, settings)
        if record["complete"]:
            seeds[path.parent.name.removeprefix("seed")] = {
                "cpu_seconds": round(record["cpu_seconds"]),
                "cells": record["cells"],
            }
    write_record(
        results,
        {
            "environment": _environment(),
            "parameters": sum(each.numel() for each in models.make(settings).parameters()),
            "settings": asdict(settings),
            "seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0]))),
        },
    )
    return sorted(seeds, key=int)


def _missing(cells: Iterable[Cell], record: dict[str, Any]) -> list[Cell]:
    return [cell for cell in cells if cell[0] not in record["cells"]]


def _file(directory: Path, number: int) -> Path:
    return directory / f"seed{number}" / "cells.json"


def _load(path: Path, settings: Settings) -> dict[str, Any]:
    if not path.is_file():
        return {"settings": asdict(settings), "complete": False, "cpu_seconds": 0.0, "cells": {}}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _raise_unless_same(record["settings"], settings, path)
    return record


def _raise_unless_same(found: dict[str, Any], settings: Settings, path: Path) -> None:
    if found != asdict(settings):
        changed = [key for key, value in asdict(settings).items() if found.get(key) != value]
        raise ValueError(f"{path}: these settings of the study have changed since: {', '.join(changed)}")


def _shorten(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.{_DIGITS}g}")


def _environment() -> dict[str, str]:
    return {
        "processor": name_processor(),
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
