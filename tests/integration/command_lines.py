"""Run several command lines of the program in the same processes, because imports take longer than the runs.

A launcher starts this script with a JSON file that holds a list of `Line`s. The script writes <file>.outcomes, one JSON
object for each command line.
"""

import functools
import gc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from pipeline import __main__ as program
from pipeline.config import Sharding, TrainConfig
from pipeline.models import loading, losses, saving, sharding, zero_checkpoints
from pipeline.models.references import ModelRef
from pipeline.runs.artifacts import Kind
from pipeline.runs.processes import is_main_process, process_count
from pipeline.runs.records import ModelRecord
from pipeline.training import callbacks, trainer
from tests.composing import composed_once


@dataclass(frozen=True)
class Line:
    """A command line.

    Attributes:
        arguments: arguments of the program.
        interrupted_at: the run is interrupted after the checkpoint of this step. None: it is not interrupted.
        is_compared: whether the weights are saved twice. The main process makes the second save without the other
            processes. Then the files of both saves are compared.
    """

    arguments: list[str]
    interrupted_at: int | None = None
    is_compared: bool = False


class Outcome(TypedDict, total=False):
    """Results of a run.

    Attributes:
        status: exit status of the program.
        share: share of the model that this process holds.
        teacher_share: share of a second model, the teacher, that this process holds. None without a second model.
        loss_left: validation loss of the model after training.
        same: for each saved file, whether it equals the file that one process saves.
        processes: number of processes.
    """

    status: int
    share: float
    teacher_share: float | None
    loss_left: float
    same: list[bool]
    processes: int


def use_gloo_alone() -> None:
    """Keep DeepSpeed from building its extension for collectives on CPUs. The build takes a minute, and gloo is enough.

    DeepSpeed 0.19 has no setting that avoids the build. On GPUs there is no such extension. On CPUs, DeepSpeed also
    starts numactl each time that it counts devices. Its answer is kept.
    """
    import deepspeed.ops
    from deepspeed.utils import numa

    deepspeed.ops.__compatible_ops__ = {}
    numa.get_numa_cores = functools.cache(numa.get_numa_cores)


def convert_in_forks() -> None:
    """Let DeepSpeed's converter of checkpoints start as a fork of a process that has imported torch."""
    import forks

    # The program lets the converter use all cores. The server refuses other variables than it was started with.
    threads = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    zero_checkpoints.module_command = lambda *command: ["env", threads, *forks.interpreter(), "-m", *command]


def measure_share(model: nn.Module) -> float:
    """Return the share of a model's values that this process holds."""
    parameters = list(model.parameters())
    # DeepSpeed gathers p.data and releases it again, but ds_tensor is always this process's shard.
    own = (p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p.data) for p in parameters)
    return sum(part.numel() for part in own) / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def measure_loss(inputs: trainer.Inputs, in_bf16: bool) -> float:
    """Return the validation loss of the model."""
    batches = losses.batches(inputs.splits.validation, 12, inputs.tokenizer.pad_token_id)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        loss = losses.measure(inputs.model, batches).supervised
    sharding.reshard(inputs.model)
    return loss


def run(line: Line) -> Outcome:
    outcome: Outcome = {}
    on_save, train, save = callbacks.Checkpoints.on_save, trainer.train, saving.save

    def save_checkpoint_and_interrupt(
        self: callbacks.Checkpoints,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **event: object,
    ) -> None:
        on_save(self, args, state, control, **event)
        if state.global_step == line.interrupted_at:
            raise KeyboardInterrupt

    def train_and_measure(inputs: trainer.Inputs, setup: trainer.Setup) -> dict[str, object]:
        details = train(inputs, setup)
        outcome["share"] = measure_share(inputs.model)
        outcome["loss_left"] = measure_loss(inputs, loading.is_mixed(setup.settings))
        second = None if inputs.teacher is None else inputs.teacher.model
        outcome["teacher_share"] = None if second is None else measure_share(second)
        return details

    def save_and_compare(
        model: PreTrainedModel, ref: ModelRef, directory: Path, *, train: TrainConfig, shared: Sharding
    ) -> tuple[Kind, ModelRecord]:
        result = save(model, ref, directory, train=train, shared=shared)
        state = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        if is_main_process():
            whole = loading.load_plain(ref.base, loading.TRAIN_DTYPES[train.precision])
            whole.load_state_dict(state)
            other = directory.with_name("other")
            other.mkdir()
            assert save(whole, ref, other, train=train, shared=shared) == result
            names = [path.name for path in other.glob("*.safetensors")]
            outcome["same"] = [(other / name).read_bytes() == (directory / name).read_bytes() for name in names]
        return result

    callbacks.Checkpoints.on_save, trainer.train = save_checkpoint_and_interrupt, train_and_measure  # type: ignore[method-assign]
    saving.save = save_and_compare if line.is_compared else save
    sys.argv = ["pipeline", *line.arguments]
    try:
        with composed_once(line.arguments):
            return {"status": program.status(line.arguments), **outcome}
    finally:
        callbacks.Checkpoints.on_save, trainer.train, saving.save = on_save, train, save  # type: ignore[method-assign]


def main(file: Path) -> None:
    # By default, a process that fails waits until the main process has printed the error. The wait is not needed here,
    # because this script goes on after an error.
    program._SECONDS_FOR_THE_MAIN_PROCESS = 0
    saving.SHARD_BYTES = 300_000  # a tiny model is then saved in several shards
    lines = [Line(**line) for line in json.loads(file.read_text(encoding="utf-8"))]
    uses_zero = any(argument.startswith("sharding=zero") for line in lines for argument in line.arguments)
    if uses_zero:
        use_gloo_alone()
    for number, line in enumerate(lines):
        if uses_zero and number == 1:  # a conversion of the first line starts a new interpreter, as a user's does
            convert_in_forks()
        outcome = run(line)
        if is_main_process():
            with Path(f"{file}.outcomes").open("a", encoding="utf-8") as outcomes:
                outcomes.write(json.dumps({**outcome, "processes": process_count()}) + "\n")
        gc.freeze()  # so that later garbage collections skip the libraries' objects


if __name__ == "__main__":
    main(Path(sys.argv[1]))
