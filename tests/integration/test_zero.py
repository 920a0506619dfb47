"""DeepSpeed's ZeRO does not change the losses, even if more processes resume the training.

The saved weights have the validation loss that training reported.

Each launch does many runs, because imports take longer than training.
"""

from dataclasses import replace

import pytest
from conftest import run_program
from test_processes import losses
from test_sharding import RISING, Case, Runs, begin, launch_lines, run_by_one_process

from pipeline.runs import artifacts

TEACHER = ("qat.distillation.weight=0.5",)
EXPERTS = tuple(f"{stage}.lora.targets=[experts]" for stage in ("sft", "qat"))
MOVING = (
    Case("smoke", "sft", "zero2"),
    Case("smoke_lora", "sft", "zero2", EXPERTS, "_experts"),
    Case("smoke_lora", "qat", "zero2", TEACHER),
)
STAYING = (Case("smoke_lora", "sft", "zero2"), Case("smoke", "qat", "zero2", TEACHER))
MOVED, STAYED = ((*kinds, *(replace(kind, sharding="zero3") for kind in kinds)) for kinds in (MOVING, STAYING))
CASES = (*MOVED, *STAYED)
KEPT = Case("smoke", "qat", "zero2", RISING, "_rising")
KEPT_MOVED = replace(KEPT, sharding="zero3")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_by_one_process(tmp_path_factory.mktemp("one"), (*MOVING, *STAYING))


@pytest.fixture(scope="module")
def shared(one: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Interrupt all cases with two processes. Resume STAYED cases with two processes, and MOVED cases with three."""
    runs = Runs(tmp_path_factory.mktemp("zero"), {})
    begun, ended = [], []
    for case in (*CASES, KEPT, KEPT_MOVED):
        begin(case, one.directory, runs.of(case))
        begun.append(case.line(runs.of(case), 3, 2, interrupted_at=4 if RISING[0] in case.more else 2))
    for case in (*STAYED, KEPT):
        ended.append(case.line(runs.of(case), 3, 2))
    outcomes = launch_lines(runs.directory / "two", 2, [*begun, *ended])
    assert {outcome["status"] for outcome in outcomes[: len(begun)]} == {130}
    moving = [case.line(runs.of(case), 2, 2) for case in (*MOVED, KEPT_MOVED)]
    outcomes = [*outcomes[len(begun) :], *launch_lines(runs.directory / "three", 3, moving)]
    names = [case.name for case in (*STAYED, KEPT, *MOVED, KEPT_MOVED)]
    return Runs(runs.directory, dict(zip(names, outcomes, strict=True)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resumed_training_has_the_losses_of_one_process(case: Case, one: Runs, shared: Runs) -> None:
    assert shared.outcomes[case.name]["status"] == 0
    assert losses(shared.of(case), case.stage) == pytest.approx(losses(one.of(case.alone), case.stage), rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_zero3_shards_parameters_of_model_and_teacher(case: Case, shared: Runs) -> None:
    """With LoRA, the teacher is the student's base. There is no second model."""
    outcome = shared.outcomes[case.name]
    assert outcome["processes"] == (3 if case in MOVED else 2)
    expected = 1 / outcome["processes"] if case.sharding == "zero3" else 1
    assert outcome["share"] == pytest.approx(expected, abs=0.06)
    has_second_model = case.more == TEACHER and case.recipe == "smoke"
    assert outcome["teacher_share"] == (pytest.approx(expected, abs=0.06) if has_second_model else None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_best_weights_are_kept_and_saved(case: Case, one: Runs, shared: Runs) -> None:
    details = artifacts.load(shared.of(case) / case.stage).details
    assert details["kept_step"] == artifacts.load(one.of(case.alone) / case.stage).details["kept_step"]
    assert shared.outcomes[case.name]["loss_left"] == pytest.approx(details["validation_loss"], rel=1e-6)
    arguments = case.arguments(shared.of(case), 12, 1)[1:]
    assert run_program("stage=evaluate", f"evaluate.source={case.stage}", "model.dtype=float32", *arguments) == 0
    saved = artifacts.load(shared.of(case) / "evaluate").details["results"][case.stage]
    assert saved["validation_loss"] == pytest.approx(details["validation_loss"], rel=1e-6)


@pytest.mark.parametrize("case", [KEPT, KEPT_MOVED], ids=lambda case: case.name)
def test_training_returns_to_the_best_weights(case: Case, shared: Runs) -> None:
    details = artifacts.load(shared.of(case) / "qat").details
    assert (details["kept_step"], details["steps"]) == (2, 6)
    assert shared.outcomes[case.name]["loss_left"] == pytest.approx(details["validation_loss"], rel=1e-6)
