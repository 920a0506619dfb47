"""The recorded peaks of the recipes agree with the estimates, and with the table in docs/training.md.

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


def test_the_page_has_the_table_of_the_record() -> None:
    page: str = SCRIPT["page"]()
    assert (ROOT / "docs" / "training.md").read_text(encoding="utf-8") == page, "run scripts/hardware_table"


@pytest.mark.parametrize("name", RECORD)
def test_an_estimate_is_within_15_percent_of_the_measured_peak(name: str) -> None:
    recipe, stage, gpus = name.split()
    plan = SCRIPT["plan_of"](recipe, int(gpus))
    model: dict[str, Any] = SCRIPT["model_config"](plan.model_path)
    estimated = device_memory.estimate(plan, stage, model, SCRIPT["TOKENS"], int(gpus))
    assert estimated == pytest.approx(max(RECORD[name].values()), rel=0.15)
