"""Save a checkpoint and stop, when the system announces the end of the job."""

from signal import Signals
from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.runs import stopping
from pipeline.runs.processes import process_count
from pipeline.runs.stopping import Stopped


class Preemption(TrainerCallback):
    """Stops training after the step in which a signal reaches any process. The checkpoint of this step is saved first.

    With several processes, a signal that arrives after the loss was computed stops them one step later.

    A line of metrics about the steps since the last line is written, too. The first line after the resume averages the
    steps after it. Weights and validation losses are those of an uninterrupted run.

    This callback comes after the callback that marks checkpoints as complete.

    Attributes:
        is_asked: whether a signal has reached any process. The trainer sets it in each step, on all processes alike.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._signal: Signals | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # The last step saves no checkpoint, and only the validation is left after it.
        is_asked = self.is_asked or (process_count() == 1 and stopping.find_request() is not None)
        if is_asked and state.global_step < state.max_steps:
            self._signal = _share_signal(args.device)
            control.should_save = control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._signal is not None:
            raise Stopped(self._signal, f" after step {state.global_step}, with a checkpoint")


def own_mark(like: Tensor) -> Tensor:
    """Return 1 if a signal has reached this process, else 0, with the shape, dtype and device of a tensor."""
    return torch.full_like(like, stopping.find_request() is not None)


def _share_signal(device: torch.device) -> Signals | None:
    """Return the signal that has reached any process, or None. All processes must stop after the same step."""
    mine = stopping.find_request()
    if process_count() == 1:
        return mine
    gathered: Any = gather(torch.tensor([mine or 0], device=device))
    number = int(gathered.max())
    return Signals(number) if number else None
