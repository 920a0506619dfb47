"""The recorded peaks of the recipes agree with the estimates, and with the tables in docs/training.md and README.md.

`scripts/hardware_table --measure` made the record, tests/golden/peaks.json, with fake tensors.
"""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from pipeline.doctor import device_memory

ROOT = Path(__file__).parents[3]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "hardware_table"))
RECORD: dict[str, dict[str, int]] = json.loads((ROOT / "tests" / "golden" / "peaks.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "text"), [("docs/training.md", "page"), ("README.md", "readme")])
def test_the_pages_have_the_tables_of_the_record(page: str, text: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == SCRIPT[text](), "run scripts/hardware_table"


@pytest.mark.parametrize("name", RECORD)
def test_an_estimate_is_within_15_percent_of_the_measured_peak(name: str) -> None:
    recipe, stage, gpus = name.split()
    plan = SCRIPT["plan_of"](recipe, int(gpus))
    model: dict[str, Any] = SCRIPT["model_config"](plan.model_path)
    estimated = device_memory.estimate(plan, stage, model, SCRIPT["TOKENS"], int(gpus))
    assert estimated == pytest.approx(max(RECORD[name].values()), rel=0.15)
