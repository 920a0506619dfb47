"""The commands of the demonstration: three runs of the program on one random checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BASE = "base"
"""Name of the first step, which makes the random checkpoint, and of the checkpoint's directory."""

TOKENS = 128
OPTIMIZER_STEPS = 2
COMMON = (
    "data=arithmetic",
    f"data.max_length={TOKENS}",
    "data.max_samples=6",
    "data.validation_fraction=0.2",
    "verify.samples=1",
)
_TRAINED = (
    *("precision=bf16", "batch_size=1", "gradient_accumulation_steps=1"),
    *(f"{key}={OPTIMIZER_STEPS}" for key in ("max_steps", "eval_steps", "save_steps")),
)


@dataclass(frozen=True)
class RunPlan:
    """A run of the program.

    Attributes:
        name: name of its directory.
        title: what it trains.
        settings: settings of all its stages.
        stages: stages in their order.
    """

    name: str
    title: str
    settings: tuple[str, ...]
    stages: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One process of the demonstration: a stage of a run, or the making of the base.

    Attributes:
        run, stage: name of the run, and name of the stage. The base has the run BASE.
        command: arguments of the Python interpreter.
    """

    run: str
    stage: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the step in the results, such as `lora/sft`."""
        return f"{self.run}/{self.stage}"


def _trained(stage: str, *more: str) -> tuple[str, ...]:
    return tuple(f"{stage}.{setting}" for setting in (*_TRAINED, *more))


RUNS = (
    RunPlan(
        "conversions",
        "every expert in BF16",
        ("upcast.experts=bf16",),
        ("doctor", "upcast", "export", "verify"),
    ),
    RunPlan(
        "lora",
        "packed experts, adapters on attention and experts",
        ("train@sft=lora", "train@qat=lora", *_trained("sft"), *_trained("qat"), "quantize.method=stochastic"),
        ("doctor", "upcast", "sft", "quantize", "qat", "export", "verify"),
    ),
    RunPlan(
        "bf16_parts",
        "packed experts, every tensor that MXFP4 keeps in BF16",
        ("train@sft=bf16_parts", "train@qat=bf16_parts", *_trained("sft", "optimizer=sgd", "learning_rate=1.0")),
        ("doctor", "upcast", "sft", "export", "verify"),
    ),
)


def steps_of(run: RunPlan, directory: Path) -> Iterator[Step]:
    """List the steps of a run. `directory` holds the base and the directories of all runs."""
    common = (f"model.path={directory / BASE}", f"run_dir={directory / run.name}", *COMMON, *run.settings)
    for stage in run.stages:
        yield Step(run.name, stage, ("-m", "pipeline", f"stage={stage}", *common))
