"""Sharding does not change losses and weights, even if training resumes with more or fewer processes.

Each launch does many runs, because imports take longer than training.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import command_lines
import pytest
from command_lines import Line, Outcome
from conftest import run_program
from forks import run_processes
from test_processes import launch, losses

from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics
from pipeline.runs.run import DATA_DIR

ACCELERATE = (
    *("accelerate.commands.launch", "--config_file=scripts/accelerate/processes.yaml"),
    *("--num_processes={}", "--no_python"),
)
STAGES = ("sft", "qat")
# Global batches have 12 examples. Training must end within the first epoch, because accelerate repeats examples to fill
# the last batch of an epoch.
SETTINGS = (
    "data.max_samples=80",
    "sft.learning_rate=3e-3",
    "qat.learning_rate=5e-4",
    "verify.samples=2",
    *(f"{stage}.{key}=2" for stage in STAGES for key in ("eval_steps", "save_steps", "logging_steps")),
    *(f"{stage}.max_steps=4" for stage in STAGES),
)
BEFORE = {"sft": ("upcast",), "qat": ("upcast", "sft", "quantize")}
# The learning rate is so high that the loss rises, so the first checkpoint is the best one.
RISING = ("qat.learning_rate=1", "qat.lr_scheduler=constant", "qat.warmup_ratio=0", "qat.max_steps=6")


@dataclass(frozen=True)
class Case:
    """A stage that is trained twice: by one process, and by several processes with interruptions."""

    recipe: str
    stage: str
    sharding: str
    more: tuple[str, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.recipe}{self.variant}-{self.stage}-{self.sharding}"

    @property
    def alone(self) -> "Case":
        """The same case for one process."""
        return replace(self, sharding="none")

    def arguments(self, run_dir: Path, batch_size: int, steps: int) -> list[str]:
        """Arguments of the program. Each process accumulates gradients over `steps` forward passes."""
        batch = [f"{stage}.batch_size={batch_size}" for stage in STAGES]
        batch += [f"{stage}.gradient_accumulation_steps={steps}" for stage in STAGES]
        return [f"stage={self.stage}", f"recipe={self.recipe}", f"run_dir={run_dir}", *SETTINGS, *self.more, *batch]

    def line(
        self,
        run_dir: Path,
        batch_size: int,
        steps: int,
        *,
        interrupted_at: int | None = None,
        is_compared: bool = False,
    ) -> Line:
        """The command line for several processes."""
        arguments = [*self.arguments(run_dir, batch_size, steps), f"sharding={self.sharding}"]
        return Line(arguments, interrupted_at, is_compared)


def plain(recipe: str) -> Case:
    """The SFT case of a recipe, without sharding. Other cases of the recipe copy their earlier stages from its run."""
    return Case(recipe, "sft", "none")


ALONE = Case("smoke", "sft", "none", ("sft.max_steps=6",), "_long")
SFT = Case("smoke", "sft", "fsdp2")
TEACHER = ("qat.distillation.weight=0.5",)
TAUGHT = Case("smoke", "qat", "fsdp2", (*TEACHER, "qat.oscillation=hold"))
ADAPTED = Case("smoke_lora", "sft", "fsdp2")
ADAPTED_QAT = Case("smoke_lora", "qat", "fsdp2", TEACHER)
SHARDED = (SFT, TAUGHT, ADAPTED, ADAPTED_QAT)
MOVED = (SFT, ADAPTED_QAT)
STAYING = (TAUGHT, ADAPTED)
MIXED = Case("smoke", "sft", "fsdp2", ("sft.precision=mixed_bf16", "sft.max_steps=2"), "_mixed")
OTHERS = {
    "gathered": Case("smoke_lora", "qat", "fsdp2", (*TEACHER, "qat.reshard_after_forward=false")),
    "rising": Case("smoke", "qat", "fsdp2", RISING),
    "mixed_bf16": MIXED,
    "bf16": Case("smoke_lora", "sft", "fsdp2", ("sft.precision=bf16", "sft.max_steps=2")),
}


@dataclass(frozen=True)
class Runs:
    """One run directory for each case.

    Attributes:
        directory: parent of the run directories.
        outcomes: name of the case -> outcome of the last run in its directory.
    """

    directory: Path
    outcomes: dict[str, Outcome]

    def of(self, case: Case) -> Path:
        return self.directory / case.name


def begin(case: Case, done: Path, run_dir: Path) -> None:
    """Make a run directory with the data tables and the completed stages that come before the case's stage."""
    for part in (*BEFORE[case.stage], DATA_DIR):
        shutil.copytree(done / plain(case.recipe).name / part, run_dir / part)


def launch_lines(
    file: Path, processes: int, lines: list[Line], launcher: tuple[str, ...] | None = None
) -> list[Outcome]:
    """Run the command lines one after the other, each with all processes. Return the outcome of each line.

    By default, the processes are forks of a process that has imported the libraries.
    """
    file.write_text(json.dumps([asdict(line) for line in lines]), encoding="utf-8")
    if launcher is None:
        outcome = run_processes(command_lines.__file__, str(file), processes=processes)
    else:
        outcome = launch(command_lines.__file__, str(file), processes=processes, launcher=launcher)
    print(outcome.stdout, outcome.stderr)  # pytest shows this if a test fails
    assert outcome.returncode == 0
    return [json.loads(line) for line in Path(f"{file}.outcomes").read_text(encoding="utf-8").splitlines()]


def run_by_one_process(directory: Path, cases: tuple[Case, ...]) -> Runs:
    """Run the earlier stages that the cases need, then the cases, all without interruptions."""
    runs = Runs(directory, {})
    before = [plain(recipe) for recipe in sorted({case.recipe for case in cases})]
    for case in before:
        for stage in ("upcast", "sft", "quantize"):
            assert run_program(*replace(case, stage=stage).arguments(runs.of(case), 4, 3)) == 0
    for case in dict.fromkeys(case.alone for case in cases):
        if case not in before:
            begin(case, directory, runs.of(case))
            runs.outcomes[case.name] = command_lines.run(Line(case.arguments(runs.of(case), 4, 3)))
            assert runs.outcomes[case.name]["status"] == 0
    return runs


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_by_one_process(tmp_path_factory.mktemp("one"), (ALONE, *SHARDED, MIXED))


@pytest.fixture(scope="module")
def shared(one: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Interrupt and resume the cases with sharding, always with the same global batch.

    STAYING cases resume with two processes again. MOVED cases resume with three processes, which accelerate starts.
    ALONE is not sharded. It moves from one process to two, and back to one, with two steps each.
    """
    runs = Runs(tmp_path_factory.mktemp("shared"), {})
    for case in (ALONE, *SHARDED):
        begin(case, one.directory, runs.of(case))
    interrupted = [command_lines.run(ALONE.line(runs.of(ALONE), 4, 3, interrupted_at=2))]
    lines = [ALONE.line(runs.of(ALONE), 2, 3, interrupted_at=4)]
    lines += [case.line(runs.of(case), 3, 2, interrupted_at=2) for case in SHARDED]
    lines += [case.line(runs.of(case), 6, 1) for case in STAYING]
    for name, case in OTHERS.items():
        begin(case, one.directory, runs.directory / name)
        lines.append(case.line(runs.directory / name, 6, 1))
    seen = launch_lines(runs.directory / "two", 2, lines)
    interrupted += seen[: 1 + len(SHARDED)]
    assert {outcome["status"] for outcome in interrupted} == {130}
    outcomes = dict(zip((*(case.name for case in STAYING), *OTHERS), seen[1 + len(SHARDED) :], strict=True))
    lines = [case.line(runs.of(case), 2, 2, is_compared=case is SFT) for case in MOVED]
    seen = launch_lines(runs.directory / "three", 3, lines, ACCELERATE)
    outcomes |= dict(zip((case.name for case in MOVED), seen, strict=True))
    outcomes[ALONE.name] = command_lines.run(ALONE.line(runs.of(ALONE), 12, 1))
    return Runs(runs.directory, outcomes)


@pytest.mark.parametrize("case", [ALONE, *SHARDED], ids=lambda case: case.name)
def test_training_resumed_with_another_number_of_processes_has_the_losses_of_one_process(
    case: Case, one: Runs, shared: Runs
) -> None:
    assert shared.outcomes[case.name]["status"] == 0
    assert losses(shared.of(case), case.stage) == pytest.approx(losses(one.of(case.alone), case.stage), rel=1e-5)


def test_layers_that_stay_gathered_for_the_backward_pass_do_not_change_the_losses(one: Runs, shared: Runs) -> None:
    assert shared.outcomes["gathered"]["status"] == 0
    expected = losses(one.of(ADAPTED_QAT.alone), "qat")
    assert losses(shared.directory / "gathered", "qat") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case.name)
def test_fsdp2_gives_each_process_an_equal_share(case: Case, shared: Runs) -> None:
    outcome = shared.outcomes[case.name]
    assert outcome["processes"] == (3 if case in MOVED else 2)
    # FSDP2 shards whole rows: three processes hold 3, 3 and 2 of 8 experts.
    assert outcome["share"] == pytest.approx(1 / outcome["processes"], abs=0.06)


def test_the_teacher_is_sharded_like_the_student(one: Runs, shared: Runs) -> None:
    assert one.outcomes[TAUGHT.alone.name]["teacher_share"] == 1
    assert shared.outcomes[TAUGHT.name]["teacher_share"] == pytest.approx(0.5, abs=0.01)


def test_with_lora_the_teacher_is_no_second_model(one: Runs, shared: Runs) -> None:
    assert one.outcomes[ADAPTED_QAT.alone.name]["teacher_share"] is None
    assert shared.outcomes[ADAPTED_QAT.name]["teacher_share"] is None


@pytest.mark.parametrize("case", [ALONE, *SHARDED], ids=lambda case: case.name)
def test_the_weights_of_the_lowest_validation_loss_are_kept(case: Case, one: Runs, shared: Runs) -> None:
    details, alone = (artifacts.load(run_dir / case.stage).details for run_dir in (shared.of(case), one.of(case.alone)))
    assert details["kept_step"] == alone["kept_step"]
    assert shared.outcomes[case.name]["loss_left"] == pytest.approx(details["validation_loss"], rel=1e-6)


def test_sharded_training_returns_to_the_best_weights(shared: Runs) -> None:
    details = artifacts.load(shared.directory / "rising" / "qat").details
    assert (details["kept_step"], details["steps"]) == (2, 6)
    assert shared.outcomes["rising"]["loss_left"] == pytest.approx(details["validation_loss"], rel=1e-6)


@pytest.mark.parametrize("case", SHARDED, ids=lambda case: case.name)
def test_weight_changes_and_router_load_are_reported_for_sharded_models(case: Case, one: Runs, shared: Runs) -> None:
    lines, alone = (
        [line for line in read_metrics(run_dir / case.stage) if "eval_loss" in line]
        for run_dir in (shared.of(case), one.of(case.alone))
    )
    for line, expected in zip(lines, alone, strict=True):
        # A difference in the last bit may move a weight across a rounding boundary, so a tolerance is needed.
        for share in ("eval_moved_weights", "eval_changed_codes"):
            assert line[share] == pytest.approx(expected[share], abs=2e-3)
        assert {name for name in line if "router" in name} == {name for name in expected if "router" in name} != set()
    assert 0 < lines[-1]["eval_changed_codes"] < 1


def test_sharded_processes_save_the_same_files_as_one_process(shared: Runs) -> None:
    same = shared.outcomes[SFT.name]["same"]
    assert len(same) > 1 and all(same)


@pytest.mark.parametrize("precision", ["mixed_bf16", "bf16"])
def test_weights_cast_to_bf16_for_the_forward_pass_are_saved_in_bf16(precision: str, shared: Runs) -> None:
    assert shared.outcomes[precision]["status"] == 0
    assert artifacts.load(shared.directory / precision / "sft").details["dtype"] == "bfloat16"


def test_mixed_precision_computes_as_in_one_process(one: Runs, shared: Runs) -> None:
    """The residual stream and the reduced gradients are FP32. Only the weights for the forward pass are BF16."""
    found, alone = losses(shared.directory / "mixed_bf16", "sft"), losses(one.of(MIXED.alone), "sft")
    assert found[:2] == pytest.approx(alone[:2], rel=2e-6)  # validation before step 1, and training in steps 1 and 2
    assert found[2] == pytest.approx(alone[2], rel=1e-3)  # only a single process keeps embeddings and norms in FP32


@pytest.mark.parametrize("case", [TAUGHT, ADAPTED_QAT], ids=lambda case: case.name)
def test_models_of_sharded_training_are_exported_and_verified(case: Case, shared: Runs) -> None:
    assert artifacts.load(shared.of(case) / "qat").details["quantizers"] == 4
    for stage in ("export", "verify"):
        arguments = case.arguments(shared.of(case), 12, 1)
        assert run_program(*(f"stage={stage}" if a == "stage=qat" else a for a in arguments)) == 0


def test_sharding_with_one_process_is_an_error(one: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(SFT, one.directory, tmp_path)
    assert command_lines.run(SFT.line(tmp_path, 12, 1))["status"] == 2
    assert "error: sharding=fsdp2: needs several processes, but there is only one." in capsys.readouterr().err
