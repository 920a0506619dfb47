"""Save a checkpoint and stop, when the system announces the end of the job."""

from signal import Signals
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.runs import stopping
from pipeline.runs.processes import process_count
from pipeline.runs.stopping import Stopped


class Preemption(TrainerCallback):
    """Stops training after the step in which a signal arrives. The checkpoint of this step is saved first.

    A line of metrics averages the steps since the line before it. So that a resumed run writes the same lines,
    training stops only after a step that writes a line. By default, every step does.

    This callback comes after the callback that marks checkpoints as complete.
    """

    def __init__(self) -> None:
        self._signal: Signals | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # The last step saves no checkpoint, and only the validation is left after it.
        if state.global_step % int(args.logging_steps) == 0 and state.global_step < state.max_steps:
            self._signal = _share_signal(args.device)
            control.should_save |= self._signal is not None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._signal is not None:
            raise Stopped(self._signal, f" after step {state.global_step}, with a checkpoint")


def _share_signal(device: torch.device) -> Signals | None:
    """Return the signal that has reached any process, or None. All processes must stop after the same step."""
    mine = stopping.find_request()
    if process_count() == 1:
        return mine
    gathered: Any = gather(torch.tensor([mine or 0], device=device))
    number = int(gathered.max())
    return Signals(number) if number else None
