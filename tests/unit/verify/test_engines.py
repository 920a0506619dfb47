"""`verify` runs each engine in its own process, reports the outcome, and compares the predictions."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import LoadingEngine, PythonConfig
from pipeline.config.engines import ENGINES, LIBRARIES
from pipeline.errors import UserError
from pipeline.export import EXPORTERS
from pipeline.verify import worker
from pipeline.verify.check import Check
from pipeline.verify.engines import Trial, check_engine, measure_divergence, prompts, raise_unless_loadable

EVEN = torch.full((2, 4), math.log(0.25))


def write_python(tmp_path: Path, does: str) -> str:
    """Write a program that replaces an engine's Python. $1 to $5 are worker, engine, checkpoint, request and result."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/bash\n{does}\n")
    path.chmod(0o755)
    return str(path)


def write_answer(tmp_path: Path, values: torch.Tensor) -> str:
    np.save(tmp_path / "answer.npy", values.numpy())
    (tmp_path / "answer.json").write_text('{"version": "engine 1.2", "generated": [[], []]}')
    return f'cp {tmp_path}/answer.npy "$5"; cp {tmp_path}/answer.json "${{5%.npy}}.json"'


def run_check(
    tmp_path: Path,
    does: str,
    seconds: float = 20.0,
    name: str = "openai",
    dtype: torch.dtype = torch.float32,
    expected: torch.Tensor = EVEN,
) -> Check:
    trial = Trial(tmp_path, ENGINES[name].targets[0], [[1, 2], [3]], dtype, seconds)
    return check_engine(name, write_python(tmp_path, does), trial, lambda rounds_yarn: expected)


def test_an_engine_with_the_same_predictions_passes_with_its_version(tmp_path: Path) -> None:
    check = run_check(tmp_path, write_answer(tmp_path, EVEN))
    assert check.status == "ok"
    assert check.measured["version"] == "engine 1.2"
    assert check.measured["nats"] == 0 and check.measured["top1_agreement"] == 1


def test_an_engine_that_expects_other_tokens_fails_with_the_divergence(tmp_path: Path) -> None:
    other = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 2).log()
    check = run_check(tmp_path, write_answer(tmp_path, other))
    assert check.status == "FAILED"
    assert check.measured["nats"] == pytest.approx(-0.25 * math.log(0.7 * 0.1**3) - math.log(4), abs=1e-6)


def test_nan_fails(tmp_path: Path) -> None:
    assert run_check(tmp_path, write_answer(tmp_path, EVEN * float("nan"))).status == "FAILED"


def test_an_engine_that_is_not_installed_is_not_checked_and_the_message_names_the_command_to_install_it(
    tmp_path: Path,
) -> None:
    check = run_check(tmp_path, f"exit {worker.NOT_INSTALLED}")
    assert check.status == "not checked"
    assert check.skipped is not None and "pip install" in check.skipped and "verify.python.openai" in check.skipped


def test_the_worker_gets_module_and_package_from_the_table(tmp_path: Path) -> None:
    does = f'cp "$4" {tmp_path}/asked.json; exit {worker.NOT_INSTALLED}'
    for name, library in LIBRARIES.items():
        run_check(tmp_path, does, name=name)
        asked = json.loads((tmp_path / "asked.json").read_text(encoding="utf-8"))
        assert (asked["module"], asked["distribution"]) == (library.module, library.distribution)


def test_the_exit_status_of_the_worker_reports_a_missing_module(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"module": "not_installed_here"}', encoding="utf-8")
    status = worker.main("mlx", str(tmp_path), str(tmp_path / "request.json"), str(tmp_path / "result.npy"))
    assert status == worker.NOT_INSTALLED and not (tmp_path / "result.npy").exists()


def test_an_engine_that_crashes_fails_with_the_end_of_its_output(tmp_path: Path) -> None:
    check = run_check(tmp_path, "for i in $(seq 100); do echo line $i; done; echo out of cheese >&2; exit 7")
    (problem,) = check.problems
    assert "exit status 7" in problem and "out of cheese" in problem and "line 100" in problem
    assert "line 50" not in problem


def test_an_engine_without_an_answer_fails(tmp_path: Path) -> None:
    assert run_check(tmp_path, "exit 0").status == "FAILED"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc of Linux")
def test_an_engine_that_hangs_is_killed_with_its_child_processes(tmp_path: Path) -> None:
    started = time.monotonic()
    check = run_check(tmp_path, f"echo began; sleep 60 & echo $! > {tmp_path}/child; wait", seconds=0.5)
    assert "no answer within verify.engine_seconds=0.5" in check.problems[0] and "began" in check.problems[0]
    assert time.monotonic() - started < 20
    child = int((tmp_path / "child").read_text())
    while is_running(child) and time.monotonic() - started < 20:
        time.sleep(0.1)  # this process is not the parent, so it cannot wait for the end
    assert not is_running(child)


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_bf16_is_allowed_more_than_fp32(tmp_path: Path) -> None:
    near = torch.tensor([[0.27, 0.25, 0.25, 0.23]] * 2).log()
    assert run_check(tmp_path, write_answer(tmp_path, near)).status == "FAILED"
    assert run_check(tmp_path, write_answer(tmp_path, near), dtype=torch.bfloat16).status == "ok"


def test_in_bf16_a_single_prompt_may_be_far_off_but_not_most(tmp_path: Path) -> None:
    far = [[0.97, 0.01, 0.01, 0.01]]
    of_three = torch.full((3, 4), math.log(0.25))
    for count, status in ((1, "ok"), (2, "FAILED")):
        does = write_answer(tmp_path, torch.tensor(far * count + [[0.25] * 4] * (3 - count)).log())
        check = run_check(tmp_path, does, dtype=torch.bfloat16, expected=of_three)
        assert check.status == status
    assert "at the median prompt" in check.problems[0]


def test_divergence_is_measured_at_the_worst_and_at_the_median_prompt() -> None:
    want = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]).log()
    have = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]).log()
    assert measure_divergence(have, want)["nats"] == pytest.approx(0.5 * math.log(0.25 / 0.09))
    assert measure_divergence(have, want)["median_nats"] == 0
    assert math.isnan(measure_divergence(have.index_fill(0, torch.tensor([1]), math.nan), want)["median_nats"])


def test_prompts_end_before_the_answer_and_in_its_middle() -> None:
    example = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, 9, 10]}
    assert prompts([example]) == [[5, 6], [5, 6, 7, 8]]


def test_an_engine_for_another_layout_and_a_missing_python_are_reported_together() -> None:
    with pytest.raises(UserError) as error:
        raise_unless_loadable(["llama_cpp", "mlx"], "mxfp4", {"llama_cpp": None, "mlx": "/not/there"})
    assert "verify.engines=llama_cpp: loads gguf, not mxfp4" in str(error.value)
    assert "verify.python.mlx=/not/there: no such program" in str(error.value)


def test_every_library_has_a_loader_a_setting_and_layouts() -> None:
    assert set(LIBRARIES) == set(worker.LOADERS) == set(LoadingEngine.__members__) == set(vars(PythonConfig()))
    assert all(set(engine.targets) <= set(EXPORTERS) for engine in ENGINES.values())


def test_the_worker_imports_nothing_of_the_program() -> None:
    source = Path(worker.__file__).read_text(encoding="utf-8")
    assert "import pipeline" not in source and "from pipeline" not in source


def test_generated_tokens_are_the_likeliest_one_after_the_other() -> None:
    def after(prompts: list[list[int]]) -> np.ndarray:
        return np.stack([np.eye(7)[(ids[-1] + len(ids)) % 7] for ids in prompts])

    assert worker.generate(after, [[1, 2], [3]], 3) == [[4, 0, 4], [4, 6, 2]]
    assert worker.generate(after, [[1, 2]], 0) == [[]]
