"""Whole runs on a pretended GPU (`pretended_gpu`). They end as on the CPU, and wait for the GPU only in known places.

Each run is a fork of a process with a pretended GPU. The reference runs on the CPU in this process at the same time.
"""

import json
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import linked, outcomes, run_program
from run_files import losses, results

from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("pretended_run.py")

SHORT = (
    "data.max_samples=60",
    "data.validation_fraction=0.1",
    "sft.learning_rate=3e-3",
    "qat.learning_rate=5e-4",
    *(f"{stage}.{setting}" for stage in ("sft", "qat") for setting in ("max_steps=4", "eval_steps=4", "save_steps=4")),
    "sft.logging_steps=1",
    "qat.logging_steps=1",
    "verify.samples=2",
)
LORA = ("recipe=smoke_lora", *SHORT, "sft.precision=bf16", "qat.precision=bf16", "evaluate.source=all")
FULL = (
    "recipe=smoke",
    *SHORT,
    *(
        f"{stage}.{setting}"
        for stage in ("sft", "qat")
        for setting in (
            "precision=mixed_bf16",
            "packing=true",
            "gradient_accumulation_steps=2",
            "batch_size=2",
            "gradient_checkpointing=true",
        )
    ),
    "qat.distillation.weight=0.5",
)
ANSWERS = (
    "recipe=smoke",
    *SHORT,
    # In FP32, `auto` would choose flex_attention, which cannot be traced with pretended tensors.
    "sft.attn_implementation=eager",
    "qat.attn_implementation=eager",
    "format=nvfp4_w4a4",
    "export.target=nvfp4",
    "eval=quick",
    "evaluate.prompts.max_samples=2",
    "evaluate.generation.max_new_tokens=6",
    "evaluate.during_training.prompts=1",
    "evaluate.during_training.max_new_tokens=4",
)


@dataclass(frozen=True)
class Runs:
    """The same command lines on the pretended GPU and on the CPU.

    Attributes:
        gpu: run directory of the pretended GPU.
        cpu: run directory of the CPU.
        outcome: what happened on the pretended GPU (`pretended_run.Outcome`).
    """

    gpu: Path
    cpu: Path
    outcome: dict[str, Any]

    def waits(self, stage: str) -> dict[tuple[str, str], float]:
        """Return the host syncs for each optimizer step, by file and kind."""
        found: Counter[tuple[str, str]] = Counter()
        for source, what, number in self.outcome["training"][stage]["syncs"]:
            found[source.rpartition(":")[0] or source, what] += number
        return {key: number / self.outcome["training"][stage]["steps"] for key, number in found.items()}


@pytest.fixture(scope="module")
def python() -> list[str]:
    """Command that runs a script on a pretended GPU."""
    return forks.interpreter("gpu")


def run_both(python: list[str], directory: Path, stages: tuple[str, ...], settings: tuple[str, ...]) -> Runs:
    file, gpu, cpu = directory / "lines.json", directory / "gpu", directory / "cpu"
    lines = [[f"stage={stage}", f"run_dir={gpu}", *settings] for stage in stages]
    file.write_text(json.dumps(lines), encoding="utf-8")
    with (directory / "log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen([*python, SCRIPT, file], stdout=log, stderr=log)
    try:
        assert [run_program(f"stage={stage}", f"run_dir={cpu}", *settings) for stage in stages] == [0] * len(stages)
        assert child.wait(timeout=600) == 0, (directory / "log").read_text(encoding="utf-8")[-4000:]
    finally:
        child.kill()
    outcome = json.loads(Path(f"{file}.outcome").read_text(encoding="utf-8"))
    assert outcome["statuses"] == [0] * len(stages), (directory / "log").read_text(encoding="utf-8")[-4000:]
    return Runs(gpu, cpu, outcome)


@pytest.fixture(scope="module")
def lora(python: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All stages with weights, with adapters in BF16."""
    stages = ("upcast", "sft", "quantize", "qat", "export", "verify", "evaluate")
    return run_both(python, tmp_path_factory.mktemp("lora"), stages, LORA)


@pytest.fixture(scope="module")
def full(python: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All weights trained in mixed precision, on packed rows, with gradient checkpointing and a teacher."""
    return run_both(python, tmp_path_factory.mktemp("full"), ("upcast", "sft", "quantize", "qat"), FULL)


@pytest.fixture(scope="module")
def answers(python: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All stages, with quantized inputs (W4A4), answers in `evaluate`, and samples during training."""
    return run_both(python, tmp_path_factory.mktemp("answers"), ("all",), ANSWERS)


def figures(run_dir: Path, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Return figures from the metrics of the stages that train."""
    lines = [line for stage in ("sft", "qat") for line in read_metrics(run_dir / stage)]
    return {name: [line[name] for line in lines if name in line] for name in names}


# On GPUs, TRL computes the loss with another kernel. This kernel adds in another order. Autocast on GPUs also keeps
# more operations in FP32.
@pytest.mark.parametrize(("case", "tolerance"), [("answers", 1e-6), ("lora", 2e-3), ("full", 5e-3)])
def test_losses_equal_those_of_the_cpu(case: str, tolerance: float, request: pytest.FixtureRequest) -> None:
    runs = request.getfixturevalue(case)
    found = losses(runs.gpu)
    assert len(found) == 12  # in each stage: 4 steps, and the validations before and after
    assert found == pytest.approx(losses(runs.cpu), rel=tolerance)


@pytest.mark.parametrize("case", ["answers", "lora", "full"])
def test_all_weights_are_trained_on_the_gpu(case: str, request: pytest.FixtureRequest) -> None:
    training = request.getfixturevalue(case).outcome["training"]
    assert set(training) == {"sft", "qat"}
    assert all(stage["devices"] == [["cuda:0", "PretendedTensor"]] for stage in training.values())


def test_changes_of_weights_and_codes_equal_those_of_the_cpu(answers: Runs) -> None:
    names = ("eval_moved_weights", "eval_changed_codes")
    found = figures(answers.gpu, names)
    assert [found["eval_moved_weights"][i] for i in (0, 2)] == [0, 0]
    assert all(share > 0 for name in names for share in (found[name][1], found[name][3]))
    for name, shares in figures(answers.cpu, names).items():
        assert found[name] == pytest.approx(shares, abs=1e-3)


def test_the_divergence_from_the_teacher_equals_that_on_the_cpu(full: Runs) -> None:
    found, expected = (figures(run, ("teacher_divergence",))["teacher_divergence"] for run in (full.gpu, full.cpu))
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("case", "tolerance"), [("answers", 1e-5), ("lora", 0.15)]
)  # BF16 attention has another kernel
def test_verify_passes_and_evaluate_finds_what_it_finds_on_the_cpu(
    case: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    runs = request.getfixturevalue(case)
    logits = {"not checked"} if case == "answers" else set()  # transformers does not load NVFP4
    assert outcomes(runs.gpu) == outcomes(runs.cpu) == {"ok"} | logits
    found, expected = results(runs.gpu), results(runs.cpu)
    assert set(found) == set(expected) >= {"upcast", "sft", "quantize", "qat"}
    for name, figures_of_model in expected.items():
        for key in ("validation_loss", "kl_divergence", "relative_weight_error"):
            if key in figures_of_model:
                assert found[name][key] == pytest.approx(figures_of_model[key], rel=tolerance), (name, key)


def test_answers_equal_those_of_the_cpu_after_and_during_training(answers: Runs) -> None:
    for stage in ("sft", "qat"):
        found, expected = (run / stage / "samples.jsonl" for run in (answers.gpu, answers.cpu))
        assert found.read_bytes() == expected.read_bytes() != b""
        found, expected = (run / "evaluate" / stage / "generations.jsonl" for run in (answers.gpu, answers.cpu))
        assert [json.loads(line)["completion"] for line in found.open()] == [
            json.loads(line)["completion"] for line in expected.open()
        ]


# --- host syncs -------------------------------------------------------------------------------------------------------

# TRL's syncs in one forward and backward pass with Triton's kernels. TRL reads five numbers. It also selects the
# supervised tokens with a mask, twice in the forward pass and once in the backward pass.
_TRL = {
    ("trl/trainer/sft_trainer.py", "item"): 5,
    ("trl/trainer/utils.py", "boolean index"): 2,
    ("backward", "boolean index"): 1,
}
_MASKS = ("transformers/masking_utils.py", "item")
_FINITE_LOSS = ("pipeline/training/trainer.py", "tolist")
_FINITE_BLOCKS = ("pipeline/models/rounded_weights.py", "item")
_TEACHER = ("pipeline/models/chunked_logits.py", "nonzero")


def remaining(found: dict[tuple[str, str], float], known: dict[tuple[str, str], float]) -> dict[object, object]:
    """Return the syncs that happen more often in a step than `known` says."""
    return {key: number for key, number in found.items() if number > known.get(key, 0)}


@pytest.mark.parametrize("case", ["lora", "answers"])
def test_a_step_of_sft_waits_for_trl_and_once_for_us(case: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(case).waits("sft")
    assert remaining(found, {**_TRL, _FINITE_LOSS: 1}) == {}
    assert found["trl/trainer/sft_trainer.py", "item"] == 5 and found[_FINITE_LOSS] == 1


def test_a_step_of_qat_waits_once_more_to_check_all_rounded_weights(lora: Runs) -> None:
    found = lora.waits("qat")
    assert remaining(found, {**_TRL, _FINITE_LOSS: 1, _FINITE_BLOCKS: 1}) == {}


def test_packed_rows_wait_for_the_masks_of_each_pass(full: Runs) -> None:
    # transformers asks once for each kind of attention (full, sliding) whether a row holds several documents.
    passes = 2
    known = {key: number * passes for key, number in {**_TRL, _MASKS: 2}.items()}
    assert remaining(full.waits("sft"), {**known, _FINITE_LOSS: 1}) == {}


def test_distillation_waits_once_in_each_pass_to_find_the_supervised_tokens(full: Runs) -> None:
    passes, models = 2, 2
    known = {_MASKS: 2 * passes * models, _TEACHER: passes, _FINITE_LOSS: 1, _FINITE_BLOCKS: 1}
    assert remaining(full.waits("qat"), known) == {}


def test_adapters_are_read_to_the_device_of_the_model(lora: Runs) -> None:
    assert not [source for source in lora.outcome["sources"] if source.startswith("pipeline/models/adapters.py")]


# --- the pretended GPU itself -----------------------------------------------------------------------------------------

REFUSED = (
    "add",
    "add to a number",
    "add a number to a vector",
    "compare",
    "cat",
    "stack numbers",
    "matmul",
    "where",
    "embedding",
    "index of the GPU",
    "values of the CPU",
    "numpy",
    "generator",
    "pin",
)
WAITING = {
    "item": ["item"],
    "bool": ["item"],
    "tolist": ["tolist"],
    "cpu": ["to cpu"],
    "copy to the CPU": ["to cpu"],
    "copy from the CPU": ["to cuda"],
    "index of the CPU": ["to cuda"],
    "nonzero": ["nonzero"],
    "equal": ["equal"],
    "mask": ["boolean index"],
    "assign to a mask": ["boolean index"],
    "backward of a mask": ["boolean index", "boolean index"],
}


def test_the_pretended_gpu_refuses_cpu_tensors_and_counts_syncs_as_cuda_does(python: list[str]) -> None:
    script = Path(__file__).with_name("pretended_operations.py")
    done = subprocess.run([*python, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, (error, _) in found.items() if error} == set(REFUSED)
    assert {name: waits for name, (_, waits) in found.items() if waits} == WAITING


def test_gptq_rounds_a_layer_of_experts_at_once_with_the_bytes_of_the_cpu(
    python: list[str], full: Runs, tmp_path: Path
) -> None:
    for name in ("gpu", "cpu"):
        linked(tmp_path / name, full.cpu, "source", "upcast", "sft")
    runs = run_both(python, tmp_path, ("quantize",), (*FULL, "quantize.method=gptq"))
    weights = [sorted((each / "quantize").glob("model*.safetensors")) for each in (runs.gpu, runs.cpu)]
    assert weights[0] and [each.read_bytes() for each in weights[0]] == [each.read_bytes() for each in weights[1]]
    counts = [artifacts.load(each / "quantize").details["fallback"] for each in (runs.gpu, runs.cpu)]
    assert counts[0] == counts[1] and counts[0]["fallback_experts"] < counts[0]["experts"]
