"""The GPUs that this process may use. Nothing here creates a CUDA context, which would take memory on the GPU.

As a program, this module prints the free memory of each GPU. `free_bytes` runs it.
"""

import json
import subprocess
from dataclasses import dataclass

from pipeline.errors import MachineError
from pipeline.runs.processes import module_command


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, its compute capability (major, minor) and its memory in bytes."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


def visible() -> tuple[Gpu, ...]:
    """List the GPUs that CUDA_VISIBLE_DEVICES lets this process see."""
    import torch

    if not torch.cuda.is_available():
        return ()
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(each.name, (each.major, each.minor), each.total_memory) for each in every)


def free_bytes() -> list[int]:
    """Start a separate process that measures the free memory of each visible GPU.

    `torch.cuda.mem_get_info` creates a CUDA context on each GPU that it measures. A context takes some hundred MB, and
    stays until its process ends.

    Raises:
        MachineError: the process failed.
    """
    command = module_command("pipeline.runs.gpus")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(f"the free memory of the GPUs cannot be measured: {reason}. Check nvidia-smi.")
    return list(json.loads(done.stdout.splitlines()[-1]))


def measure_free_bytes() -> list[int]:
    """Measure the free memory of each visible GPU. This creates a CUDA context on each of them."""
    import torch

    return [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]


if __name__ == "__main__":
    print(json.dumps(measure_free_bytes()))
