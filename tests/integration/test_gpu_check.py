"""scripts/gpu_check runs on a pretended GPU. It fails if a check fails, and keeps the results of killed sections."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch

from pipeline.numerics import codec
from pipeline.training import attention_check

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check"
VARIANTS = ("qat_packed", "sft_packed", "trl", "qat")

Rows = dict[str, list[dict[str, Any]]]


def start(out: Path, *arguments: str, python: str, **environment: str) -> "subprocess.Popen[str]":
    """Start the script at tiny sizes. `python` is the command that starts Python in its child processes."""
    command = [sys.executable, SCRIPT, "--sizes", "tiny", "--out", out, *arguments]
    everything = {**os.environ, "GPU_CHECK_PYTHON": python, **environment}
    return subprocess.Popen(command, cwd=ROOT, env=everything, stdout=subprocess.PIPE, text=True)


def check(out: Path, *arguments: str, python: str, **environment: str) -> tuple[int, Rows]:
    """Run the script at tiny sizes. Return the exit status and the rows of each section."""
    process = start(out, *arguments, python=python, **environment)
    process.communicate(timeout=590)
    return process.returncode, json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))


def flags(rows: list[dict[str, Any]]) -> dict[str, bool | None]:
    return {row["name"]: row["is_right"] for row in rows}


# --- all sections on a pretended GPU ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Rows, Path]:
    """Exit status, rows and directory of a run with all sections."""
    out = tmp_path_factory.mktemp("whole")
    # More time than users have, because other tests run at the same time.
    arguments = ("--minutes", "12", "--variants", *VARIANTS)
    python = shlex.join(forks.interpreter("gpu"))
    return *check(out, *arguments, python=python, GPU_CHECK_PRETENDED="1"), out


def test_every_section_passes_on_a_pretended_gpu(whole: tuple[int, Rows, Path]) -> None:
    status, rows, _ = whole
    assert [row for section in rows.values() for row in section if row["is_right"] is False] == []
    assert status == 0
    checked = {name: sum(row["is_right"] is True for row in section) for name, section in rows.items()}
    assert checked == {
        "machine": 1,
        "codec": 2,
        "attention": 4,
        "smoke": 4,
        "training": 0,
        "conversion": 4,
        "generation": 1,
    }


def test_each_variant_is_measured_beside_its_prediction_and_beside_plain_trl(whole: tuple[int, Rows, Path]) -> None:
    rows = {row["name"]: row for row in whole[1]["training"]}
    packed, plain = "SFT, packed experts", "plain TRL + PEFT, SFT"
    assert rows[f"{packed} / {plain}"]["value"] == rows[packed]["value"] / rows[plain]["value"] > 0
    for title in (packed, "QAT, packed experts"):
        beside = rows[f"{title}: peak allocated"]["beside"]
        assert beside.startswith("predicted ") and beside.endswith("; a pretended GPU counts no memory")


def test_a_step_of_qat_is_profiled(whole: tuple[int, Rows, Path]) -> None:
    _, rows, out = whole
    profiles = [row for row in rows["training"] if "profile of a step" in row["name"]]
    assert [row["unit"] for row in profiles] == ["", "% of the CPU's time"]
    assert 0 < profiles[1]["value"] <= 100
    assert "aten::mm" in (out / "profile.txt").read_text(encoding="utf-8")
    assert "profile.txt" in (out / "gpu_check.md").read_text(encoding="utf-8")


# --- sections that are killed, crash or do not run --------------------------------------------------------------------

STUB = """
import os, runpy, subprocess, sys, time, types
from pathlib import Path

def last_measurement(*_, **__):
    {what}

torch = types.ModuleType("torch")
properties = types.SimpleNamespace(name="stub", major=9, minor=0, total_memory=8 * 10**9)
torch.cuda = types.SimpleNamespace(is_available=lambda: True, get_device_properties=lambda _: properties)
torch.version = types.SimpleNamespace(cuda="0")
torch.__version__, torch.uint8, torch.zeros = "0", None, last_measurement
sys.modules["torch"] = torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that runs instead of Python. It simulates a machine with a GPU, on which `torch.zeros` runs `what`."""
HANG = """
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(command, start_new_session=True)
    Path({pid!r}).with_suffix(".new").write_text(str(child.pid))
    Path({pid!r}).with_suffix(".new").rename({pid!r})
    time.sleep(600)
"""
FIRST_ROWS = {"GPU": None, "memory": None, "torch": None, "packages": True}


def stub(directory: Path, what: str) -> str:
    path = directory / "stub.py"
    path.write_text(STUB.format(what=what.strip()), encoding="utf-8")
    return f"{sys.executable} {path}"


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_section_that_takes_too_long_keeps_its_rows_and_dies_with_all_its_processes(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    python = stub(tmp_path, HANG.format(pid=str(pid)))
    status, rows = check(tmp_path, "--sections", "machine", "--minutes", "0.25", python=python)
    assert status == 1
    assert flags(rows["machine"]) == {**FIRST_ROWS, "section": False}
    assert rows["machine"][-1]["beside"].startswith("took more than ")
    assert not is_running(int(pid.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_kills_all_processes(number: signal.Signals, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    process = start(tmp_path, "--sections", "machine", python=stub(tmp_path, HANG.format(pid=str(pid))))
    while not pid.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert not is_running(int(pid.read_text()))


def test_a_section_that_crashes_keeps_its_rows(tmp_path: Path) -> None:
    status, rows = check(tmp_path, "--sections", "machine", python=stub(tmp_path, "raise ValueError('broken')"))
    assert status == 1
    assert flags(rows["machine"]) == {**FIRST_ROWS, "section": False}
    assert rows["machine"][-1]["beside"] == "ValueError: broken"


def test_a_machine_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    status, rows = check(tmp_path, "--sections", "machine", python=sys.executable)
    assert status == 1
    (row,) = rows["machine"]
    assert (row["value"], row["beside"], row["is_right"]) == ("failed", "no GPU is visible to torch here", False)


def test_children_of_children_belong_to_the_family_too(
    gpu_check: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpu_check.FAMILY, ":outer:")
    script = "import json, os, sys; print('@ ' + json.dumps(os.environ[sys.argv[1]]))"
    monkeypatch.setattr(gpu_check, "PYTHON", [sys.executable, "-c", script, gpu_check.FAMILY])
    (family,), failure = gpu_check._child(["--variant", "sft"], task, 60)
    assert failure == ""
    assert family.startswith(":outer::") and len(family) > len(":outer:::")


def test_the_program_finds_wheels_that_pythonpath_names(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "path"
    monkeypatch.setenv("PYTHONPATH", "/wheels")
    monkeypatch.setattr(gpu_check, "PYTHON", ["sh", "-c", f'echo "$PYTHONPATH" > {found}'])
    gpu_check._program("stage=all")
    assert found.read_text().strip() == f"{ROOT}:/wheels"


def test_sections_without_time_are_wrong_unless_they_were_left_out(tmp_path: Path) -> None:
    status, rows = check(tmp_path, "--minutes", "0", "--sections", "codec", "smoke", python=sys.executable)
    assert status == 1
    wrong = {"section": False}
    assert {name: flags(section) for name, section in rows.items()} == {"codec": wrong, "smoke": wrong}


# --- single functions -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_check() -> Any:
    """The script as a module."""
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look it up
    loader.exec_module(module)
    return module


@pytest.fixture
def task(gpu_check: Any, tmp_path: Path) -> Any:
    """All sections, with nine minutes."""
    end = time.monotonic() + 9 * 60 - gpu_check.UNCOUNTED_SECONDS
    return gpu_check.Task(gpu_check.SIZES["tiny"], tmp_path, tuple(gpu_check.VARIANTS), end, ())


def test_all_sections_together_fit_into_nine_minutes_even_if_each_takes_too_long(
    gpu_check: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, limits = time.monotonic(), []
    start = now
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now))

    def take_too_long(_: object, __: object, limit: float) -> tuple[list[dict[str, Any]], str]:
        nonlocal now
        limits.append(limit)
        now += limit
        return [], "took too long"

    monkeypatch.setattr(gpu_check, "_child", take_too_long)
    assert gpu_check._run_all(list(gpu_check.SECTIONS), task) == 1
    assert limits == pytest.approx([share for share, _ in gpu_check.SECTIONS.values()], abs=1)
    assert now - start <= 9 * 60 - gpu_check.UNCOUNTED_SECONDS + 1e-6


def status_of(gpu_check: Any, task: Any, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit status of a run whose only section has these rows."""
    monkeypatch.setattr(gpu_check, "_child", lambda *_: ([asdict(row) for row in rows], ""))
    status: int = gpu_check._run_all(["codec"], task)
    return status


@pytest.mark.parametrize("is_broken", [False, True])
def test_other_bits_of_the_codec_are_wrong(
    gpu_check: Any, task: Any, is_broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = codec.encode

    def flip(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, scales = encode(*arguments)
        blocks.view(-1)[0] ^= 1
        return blocks, scales

    if is_broken:
        monkeypatch.setattr(codec, "encode", flip)
    digest = next(gpu_check.codec(task))
    assert digest.is_right is not is_broken
    assert status_of(gpu_check, task, [digest], monkeypatch) == is_broken


def test_an_error_of_an_attention_kernel_is_wrong_but_a_kernel_that_is_not_available_is_not(
    gpu_check: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(name: str, *_: object, is_packed: bool) -> tuple[dict[str, float], float]:
        if name == "fused_sinks":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        return {"the output": float("nan") if is_packed else 0.01, "the gradient of q": 0.0}, 0.01

    monkeypatch.setattr(attention_check, "measure_errors", measure)
    monkeypatch.setattr("pipeline.models.attention.capability", lambda: (9, 0))
    monkeypatch.setattr("pipeline.models.attention.importlib.util.find_spec", lambda _: None)
    rows = list(gpu_check.attention(task))
    fused, packed, eager, eager_packed, *flex = rows
    assert fused.beside == packed.beside == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert (fused.is_right, packed.is_right, eager.is_right, eager_packed.is_right) == (False, False, True, False)
    assert eager_packed.unit == "the output"
    assert [(row.is_right, row.value) for row in flex] == [(None, "not checked")] * 2
    assert status_of(gpu_check, task, [fused], monkeypatch) == 1
    assert status_of(gpu_check, task, [*flex, eager], monkeypatch) == 0


@pytest.mark.parametrize(
    ("variant", "allocated", "predicted", "is_pretended", "is_right"),
    [
        ("qat_packed", 114, 100, False, True),
        ("qat_packed", 86, 100, False, True),
        ("qat_packed", 116, 100, False, False),
        ("qat_packed", 84, 100, False, False),
        ("qat_packed", 100, None, False, False),
        ("qat_packed", 0, 100, False, False),
        ("qat_packed", 0, 100, True, None),
        ("qat_packed", 0, None, True, False),
        ("trl", 100, None, False, None),
    ],
)
def test_a_peak_must_be_predicted_within_15_percent(
    gpu_check: Any,
    task: Any,
    variant: str,
    allocated: int,
    predicted: int | None,
    is_pretended: bool,
    is_right: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_check, "IS_PRETENDED", is_pretended)
    row = gpu_check._peak_row(gpu_check.VARIANTS[variant], allocated * 10**9, predicted and predicted * 10**9, "why")
    assert row.is_right is is_right
    assert row.beside.startswith("predicted 100.0" if predicted else "no prediction: why")
    assert status_of(gpu_check, task, [row], monkeypatch) == (is_right is False)


FIGURES = {"steps": [2.0, 2.0], "tokens": 10, "flops": 1e12, "layers": 2, "allocated": 100, "reserved": 120}


def test_training_judges_peaks_keeps_figures_of_a_crash_and_counts_variants_without_time(
    gpu_check: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([60.0, 50.0, 40.0, 30.0, 20.0, 10.0])

    def run(more: list[str], task: Any, limit: float) -> tuple[list[dict[str, Any]], str]:
        limits[more[-1]] = limit
        task_end(next(left, 5.0))
        return [] if more[-1] == "trl" else [FIGURES], {"qat": "Error: late", "trl": "Error: at once"}.get(more[-1], "")

    def task_end(seconds: float) -> None:
        now[0] = task.end - seconds - 2

    limits: dict[str, float] = {}
    now = [0.0]
    task_end(100)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_check, "_child", run)
    monkeypatch.setattr(gpu_check, "_job", lambda name, _: name)
    others = {"sft": (None, "broken"), "qat": (80, "")}
    monkeypatch.setattr(gpu_check, "_predict", lambda jobs: {name: others.get(name, (100, "")) for name in jobs})
    rows = list(gpu_check.training(task))
    assert limits == {
        "qat_packed": 100,
        "sft_packed": 60,
        "trl": 50,
        "qat": 40,
        "sft": 30,
        "qat_eager": 20,
        "modelopt": 10,
    }
    wrong = [(row.name, row.beside) for row in rows if row.is_right is False]
    assert wrong == [
        ("plain TRL + PEFT, SFT", "Error: at once"),
        ("QAT, decoded experts", "Error: late"),
        ("QAT, decoded experts: peak allocated", "predicted 0.0"),
        ("SFT, decoded experts: peak allocated", "no prediction: broken"),
    ]
    task_end(0.5)
    rows = list(gpu_check.training(task))
    assert [(row.value, row.is_right) for row in rows] == [("not run", False)] * 6 + [("not run", None)]


def test_a_profile_has_launches_and_shares_of_the_time_of_the_gpu(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.autograd import DeviceType

    class Averages(list[Any]):
        def table(self, *, sort_by: str, row_limit: int) -> str:
            return f"sorted by {sort_by}"

    def row(
        key: str, count: int, gpu: int, where: DeviceType = DeviceType.CPU, is_user_annotation: bool = False
    ) -> Any:
        times = {"self_device_time_total": gpu, "self_cpu_time_total": 1}
        return SimpleNamespace(key=key, count=count, device_type=where, is_user_annotation=is_user_annotation, **times)

    averages = Averages(
        [
            row("Optimizer.step", 1, 1000, DeviceType.CUDA, is_user_annotation=True),
            row("gemm_kernel", 4, 60, DeviceType.CUDA),
            row("triton_kernel", 2, 40, DeviceType.CUDA),
            row("aten::mm", 4, 60),
            row("cudaLaunchKernel", 4, 0),
            row("cuLaunchKernelEx", 2, 0),
        ]
    )
    launches, share = gpu_check._profile_rows(averages, tmp_path)
    assert (launches.value, launches.is_right) == (6, True)
    assert (share.value, share.unit) == (60, "% of the GPU's time")
    assert share.beside.startswith("aten::mm 60 %, ")
    assert (tmp_path / "profile.txt").read_text() == "sorted by self_device_time_total\n"


# --- packages ---------------------------------------------------------------------------------------------------------


def test_pins_are_those_of_pyproject(gpu_check: Any) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and newer
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [f"{name}{specifier}" for name, specifier in gpu_check._pins().items()] == project["dependencies"]


def test_missing_packages_and_wrong_versions_are_named(gpu_check: Any) -> None:
    needed = {"torch": {">=2.11"}, "no-such-package": {""}, "transformers": {">=1", "<2"}}
    found = gpu_check._wrong_among(needed)
    assert found == [
        "no-such-package is missing",
        f"transformers {gpu_check.version('transformers')} instead of <2,>=1",
    ]


def test_the_wheels_are_all_packages_that_a_machine_with_the_large_ones_lacks(gpu_check: Any) -> None:
    carried = gpu_check._carried("3.12")
    assert {"transformers", "tokenizers", "pydantic-core", "antlr4-python3-runtime", "typer"} <= set(carried)
    assert not {"torch", "numpy", "pyarrow", "pillow", "gpt-oss-qat"} & set(carried)
    assert not [name for name in carried if name.startswith("nvidia-cu")]


def test_wheels_that_do_not_fit_are_named(gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "version", lambda _: "1.0")
    for name in ("fits-1.0-py3-none-any", "old-0.9-py3-none-any", "tagged-1.0-cp311-cp311-manylinux_2_28_x86_64"):
        (tmp_path / f"{name}.whl").touch()
    with (tmp_path / "stable-1.0-cp39-abi3-manylinux2014_x86_64.whl").open("wb") as large:
        large.truncate(65 * 2**20)
    packages = ["fits", "old", "tagged", "stable", "absent"]
    assert gpu_check._wheel_problems(tmp_path, packages, "3.12") == [
        "tagged-1.0-cp311-cp311-manylinux_2_28_x86_64.whl is not for Python 3.12 on Linux",
        "old has 0.9 instead of 1.0",
        "absent has no wheel instead of 1.0",
        "65.0 MiB, but 64 MiB are allowed",
    ]


def test_no_wheels_are_made_of_versions_that_differ_from_pyproject(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_pins", lambda: {"peft": "==0.1"})
    with pytest.raises(SystemExit, match=r"this environment differs from pyproject.toml: peft .* instead of ==0\.1"):
        gpu_check._make_wheels(tmp_path, "3.12")
