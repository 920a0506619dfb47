"""Sends a signal to the last of several processes, and prints the step after which each process stops."""

import os
import signal

import pytest
import torch
from accelerate.utils import reduce
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.runs import stopping
from pipeline.runs.processes import process_count, wait_for_everyone
from pipeline.runs.stopping import Stopped
from pipeline.training import preemption
from pipeline.training.preemption import Preemption


def stop() -> str:
    """Return the message of the exception that stops this process. The signal arrives in step 3."""
    arguments = TrainingArguments(use_cpu=True, logging_steps=500, report_to="none")
    callback, control, state = Preemption(), TrainerControl(), TrainerState(max_steps=9)
    with pytest.raises(Stopped) as caught, stopping.deferred("sft", "after this step"):
        for state.global_step in range(1, 9):
            if state.global_step == 3 and int(os.environ["RANK"]) == process_count() - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            callback.is_asked = bool(reduce(preemption.own_mark(torch.zeros(())), "sum") > 0)  # as the trainer does
            callback.on_step_end(arguments, state, control)
            if control.should_save:
                callback.on_save(arguments, state, control)
    return str(caught.value)


if __name__ == "__main__":
    stopping.heed_signals()
    wait_for_everyone()
    print(f"process {os.environ['RANK']}: {stop()}", flush=True)
