"""Every measuring script starts, and bench_numerics' table of errors agrees with known properties of the formats."""

import json
import math
import subprocess
from pathlib import Path

import forks
import pytest

from scripts.recording import formatted, name_processor

SCRIPTS = Path(__file__).parents[2] / "scripts"


def output(script: str, *arguments: str) -> str:
    command = [*forks.interpreter(), str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "script",
    [
        "bench_conversions",
        "bench_packed",
        "bench_training",
        "demo_full_shape",
        "engine_matrix",
        "gpu_check",
        "measure_scorers",
        "study_rounding",
    ],
)
def test_a_script_finds_all_that_it_uses(script: str) -> None:
    assert script in output(script, "--help")


@pytest.mark.parametrize("name", ["demo", "rounding"])
def test_the_record_of_a_study_is_written_to_the_same_bytes(name: str) -> None:
    text = (SCRIPTS.parent / "docs" / f"{name}.json").read_text(encoding="utf-8")
    assert formatted(json.loads(text)) + "\n" == text


def test_one_script_alone_reads_the_name_of_the_processor() -> None:
    files = [path for path in SCRIPTS.rglob("*") if path.is_file() and path.suffix in ("", ".py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    reading = [name for name, text in texts.items() if "cpuinfo" in text or "platform.processor" in text]
    assert reading == ["recording.py"]
    assert name_processor()


def test_the_table_of_errors(smoke_run: Path) -> None:
    """A tiny model's weights lie on MXFP4's grid. Weights from a normal distribution do not."""
    arguments = ("--shape", "2", "64", "96", "--repeats", "1", "--compilation", "never")
    lines = output("bench_numerics", *arguments, "--model", str(smoke_run / "upcast")).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    found = {(name.split(",")[0], rule, weights): others for name, rule, weights, *others in rows}
    assert len(found) == len(rows) == 8 * 4
    for (_, rule, _), (error, decibels, saturated, _, _) in found.items():
        if decibels != "exact":
            assert float(decibels) == pytest.approx(-10 * math.log10(float(error)), abs=0.01)
        assert rule != "ceil" or float(saturated) == 0
    assert found["mxfp4", "ceil", str(smoke_run / "upcast")][:2] == ["0.00000", "exact"]
    normal = {(name, rule): float(row[0]) for (name, rule, weights), row in found.items() if weights == "normal"}
    for name in ("mxfp4", "nvfp4"):
        assert 0 < normal[name, "mse"] == min(error for key, error in normal.items() if key[0] == name)
    assert normal["nvfp4", "mse"] < normal["mxfp4", "mse"]
