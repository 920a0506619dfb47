"""scripts/demo_full_shape: its commands run, it continues where it stopped, and the page has the committed results.

Here, the steps run in this process on the tiny model. One test starts a process of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_program

from pipeline.checkpoints.gpt_oss import Shape, packed_tensors
from pipeline.models.tiny_model import GPT_OSS_20B
from scripts.full_shape import page
from scripts.full_shape.plan import RUNS
from scripts.full_shape.processes import Ended
from scripts.full_shape.record import Demonstration, StepFailed

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "full_shape.json"
RELEASED_BYTES = 13_761_264_768
"""`total_size` in the index of openai/gpt-oss-20b."""


class Runner:
    """Runs the steps in this process. The step `broken` fails once."""

    def __init__(self, tiny: Path, broken: str = "") -> None:
        self.started: list[str] = []
        self._tiny, self._broken = tiny, broken

    def __call__(self, command: tuple[str, ...], root: Path, log: Path) -> Ended:
        self.started.append(log.stem)
        if log.stem == self._broken:
            self._broken = ""
            return Ended(1, 2.0, 1.0, 3 << 30)
        if command[0] == "make":
            shutil.copytree(self._tiny, command[1])
            return Ended(0, 1.0, 1.0, 1 << 30)
        return Ended(run_program(*command[2:]), 4.0, 2.0, 1 << 30)


@pytest.fixture
def demonstration(tiny: Path, tmp_path: Path) -> tuple[Demonstration, Runner, Path]:
    runner, directory = Runner(tiny, broken="lora-quantize"), tmp_path / "work"
    results = tmp_path / "results.json"
    make_base = ("make", str(directory / "base"))
    return Demonstration("tiny", directory, results, make_base, ROOT, runner), runner, results


def test_a_second_call_repeats_only_the_step_that_failed(
    demonstration: tuple[Demonstration, Runner, Path], tmp_path: Path
) -> None:
    made, runner, results = demonstration
    with pytest.raises(StepFailed, match="lora/quantize ended with status 1"):
        made.run([run.name for run in RUNS])
    begun = list(runner.started)
    again = Demonstration("tiny", tmp_path / "work", results, ("make",), ROOT, runner)
    again.run([run.name for run in RUNS])
    every = ["base-make", *(f"{run.name}-{stage}" for run in RUNS for stage in run.stages)]
    assert [*begun, *runner.started[len(begun) + 1 :]] == every
    assert runner.started[len(begun)] == begun[-1] == "lora-quantize"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["base"]

    record = json.loads(results.read_text(encoding="utf-8"))
    repeated = record["steps"]["lora/quantize"]
    assert (repeated["attempts"], repeated["seconds"], repeated["peak_bytes"]) == (2, 6.0, 3 << 30)
    assert {step["result"]["ok"] for name, step in record["steps"].items() if name.endswith("/verify")} == {9}
    assert str(tmp_path) not in json.dumps(record)
    written = page.text(results)
    assert "Not complete" not in written and "2 attempts" in written and "| 6 | 3 | 3.00 |" in written


def test_results_of_another_shape_are_refused(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"shape": "20b", "environment": {}, "steps": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match="has the results of --shape 20b"):
        Demonstration("tiny", tmp_path, results, (), ROOT)


MEASURING = """
import json, sys
from pathlib import Path
from scripts.full_shape import processes
large = "x = bytearray(b'1') * (200 << 20); print(len(x)); raise SystemExit(3)"
print(json.dumps(vars(processes.run(("-c", large), Path(sys.argv[1]), Path(sys.argv[2])))))
"""


def test_a_process_is_measured(tmp_path: Path) -> None:
    """A process begins with the peak of its parent, so a small process measures it here as well."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", MEASURING, str(ROOT), str(log)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    ended = json.loads(done.stdout)
    assert (ended["status"], log.read_text(encoding="utf-8")) == (3, f"{200 << 20}\n")
    assert 200 << 20 < ended["peak_bytes"] < 300 << 20 and 0 < ended["cpu_seconds"] < ended["seconds"] + 1


def test_the_shape_is_that_of_the_released_model() -> None:
    sizes = Shape(**{name: getattr(GPT_OSS_20B, name) for name in Shape.__dataclass_fields__})
    assert sum(info.bytes for info in packed_tensors(sizes).values()) == RELEASED_BYTES


def test_the_page_has_the_committed_results() -> None:
    written = page.PAGE.read_text(encoding="utf-8")
    assert written == page.text(RESULTS), "run scripts/demo_full_shape --table"


def test_the_script_names_a_mistake() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo_full_shape"), "--shape", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs its own --results" in done.stderr
