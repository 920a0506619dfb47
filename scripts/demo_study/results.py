"""The results file docs/demo.json: the figures of each case and seed, each with the environment that they come from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.demo_study.runs import CASES, SEEDED
from scripts.recording import write_record
from scripts.rounding_study.statistics import Estimate, estimate


@dataclass(frozen=True)
class Results:
    """All figures of the study.

    Attributes:
        record: contents of the results file.
    """

    record: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the results file. A missing file has no results."""
        if not path.is_file():
            return cls({"cases": {}})
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def seeds(self, case: str) -> dict[str, Any]:
        """Return the figures of a case: seed -> figures."""
        found: dict[str, Any] = self.record["cases"].get(case, {})
        return found

    def models(self, case: str) -> list[str]:
        """Return the models of a case in the order of its report. Every seed has the same models."""
        return list(next(iter(self.seeds(case).values()))["models"])

    def mean(self, case: str, model: str, figure: str) -> Estimate | None:
        """Estimate a model's figure over the seeds. Return None if the model has no such figure."""
        found = [each["models"][model].get(figure) for each in self.seeds(case).values()]
        return None if None in found else estimate([float(value) for value in found])

    def difference(self, case: str, model: str, reference: str, figure: str) -> Estimate:
        """Estimate the difference of two models' figures. The pairs have the same seed."""
        seeds = [each["models"] for each in self.seeds(case).values()]
        return estimate([each[model][figure] - each[reference][figure] for each in seeds])


def is_stored(directory: Path, case: str, seed: int) -> bool:
    """Return whether the figures of a run are stored."""
    return _stored(directory, case, seed).is_file()


def store(directory: Path, case: str, seed: int, figures: dict[str, Any]) -> None:
    """Store the figures of a run beside it."""
    write_record(_stored(directory, case, seed), figures)


def _stored(directory: Path, case: str, seed: int) -> Path:
    return directory / case / f"seed{seed}.json"


def collect(directory: Path, path: Path) -> None:
    """Write all stored figures into the results file. A run that is not stored keeps the figures that the file has."""
    cases = Results.read(path).record["cases"]
    for case in CASES:
        for file in (directory / case.name).glob("seed*.json"):
            figures = json.loads(file.read_text(encoding="utf-8"))
            cases.setdefault(case.name, {})[file.stem.removeprefix("seed")] = figures
    ordered = {
        case.name: {seed: cases[case.name][seed] for seed in sorted(cases[case.name], key=int)}
        for case in CASES
        if case.name in cases
    }
    write_record(path, {"seeded": list(SEEDED), "cases": ordered})
