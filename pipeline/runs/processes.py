"""Which process this is, of how many, and the barrier between them."""

import os
from datetime import timedelta

_PATIENCE = timedelta(days=1)


def is_main_process() -> bool:
    """Whether this process is the only one, or the first that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes `accelerate launch` or `torchrun` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_everyone() -> None:
    """Let all processes come to this point before any goes on."""
    if process_count() > 1:
        import torch
        from accelerate import PartialState

        # The first PartialState makes the process group. Without cpu=True it makes none on a machine without a GPU; the
        # default timeout (10 minutes on GPUs) is shorter than the main process may be busy converting a model.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE).wait_for_everyone()
