"""The commands that faults disturb: every stage and export target, full and LoRA, and training on two processes."""

from dataclasses import dataclass
from pathlib import Path

_TINY = (
    *("recipe=smoke", "data.max_samples=24", "verify.samples=1", "evaluate.batch_size=8"),
    *("quantize.calibration_samples=4", "quantize.batch_size=2"),
)
_TRAINING = ("batch_size=2", "max_steps=4", "eval_steps=2", "save_steps=2", "logging_steps=1")
_METHODS = {
    "full": (*_TINY, *(f"{stage}.{setting}" for stage in ("sft", "qat") for setting in _TRAINING)),
    "lora": (),
}
_METHODS["lora"] = (*_METHODS["full"], "train@sft=lora", "train@qat=lora", "sft.lora.layers=[1]", "qat.lora.layers=[1]")
_TARGETS = {
    "mxfp4": (),
    "openai": ("export.target=openai",),
    "gguf": ("export.target=gguf",),
    "bf16": ("export.target=bf16",),
    "nvfp4": ("export.target=nvfp4", "format=nvfp4", "export.source=sft"),
}
BASE = ("upcast", "sft", "quantize", "qat", "export", "verify", "evaluate", "compare")
"""Stages of the runs from which the scenarios start."""


@dataclass(frozen=True)
class Scenario:
    """A command, and the run in which it starts.

    Attributes:
        name: name in the table.
        stage: the stage that the command runs.
        method: training method.
        needs: stages that are complete when the command starts.
        settings: settings besides those of the method.
        settings_before: settings with which the stage was complete before. The command then has overwrite=true.
        processes, rank: number of processes, and the one that is disturbed.
    """

    name: str
    stage: str
    method: str = "full"
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    settings_before: tuple[str, ...] = ()
    processes: int = 1
    rank: int = 0

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command line, without run_dir."""
        again = ("overwrite=true",) if self.settings_before else ()
        return (f"stage={self.stage}", *_METHODS[self.method], *self.settings, *again)

    @property
    def arguments_before(self) -> tuple[str, ...]:
        """The command line that made the stage before."""
        return (f"stage={self.stage}", *_METHODS[self.method], *self.settings_before)


def base_arguments(method: str, stage: str) -> tuple[str, ...]:
    """Return the command line that makes a stage of the runs in which scenarios start."""
    every_model = ("evaluate.source=all",) if stage == "evaluate" else ()
    return (f"stage={stage}", *_METHODS[method], *every_model)


def copied(base: Path, scenario: Scenario) -> list[Path]:
    """List the directories of a base run with which the command starts. Without stages, it starts from nothing."""
    return [base / name for name in (*scenario.needs, "source")] if scenario.needs else []


def _before(stage: str) -> tuple[str, ...]:
    return BASE[: BASE.index(stage)]


def _all() -> list[Scenario]:
    made = [Scenario("doctor", "doctor"), Scenario("upcast", "upcast")]
    made += [Scenario("upcast packed", "upcast", "lora")]
    for method in ("full", "lora"):
        for stage in ("sft", "quantize", "qat"):
            made.append(Scenario(f"{stage} {method}", stage, method, _before(stage)))
        for target, settings in _TARGETS.items():
            needs = ("upcast", "sft") if target == "nvfp4" else _before("export")
            made.append(Scenario(f"export {target} {method}", "export", method, needs, settings))
    made.append(Scenario("quantize gptq full", "quantize", "full", ("upcast", "sft"), ("quantize.method=gptq",)))
    made.append(Scenario("verify", "verify", needs=_before("verify")))
    made.append(Scenario("evaluate", "evaluate", needs=_before("evaluate"), settings=("evaluate.source=all",)))
    made.append(Scenario("compare", "compare", needs=_before("compare")))
    made.append(Scenario("publish", "publish", needs=BASE))
    before = ("sft.learning_rate=1e-2",)
    made.append(Scenario("sft overwrite", "sft", needs=("upcast",), settings_before=before))
    before = ("sft.learning_rate=1e-2", "train@sft=lora")
    made.append(Scenario("sft lora → full", "sft", needs=("upcast",), settings_before=before))
    before = ("export.shard_bytes=200000",)
    made.append(Scenario("export overwrite", "export", needs=_before("export"), settings_before=before))
    for sharding in ("none", "fsdp2"):
        for rank in range(2):
            settings = (f"sharding={sharding}",)
            name = f"sft {sharding}, rank {rank} of 2"
            made.append(Scenario(name, "sft", "full", ("upcast",), settings, processes=2, rank=rank))
    return made


SCENARIOS = {scenario.name: scenario for scenario in _all()}
