"""Measure the peak memory of a training stage on a GPU that does not exist.

`fake_run` trains models of a few layers on fake tensors, in processes of its own. The peaks grow linearly with the
number of layers. So the peaks of the whole model are computed from the peaks of these models. The CUDA context,
fragmentation and NCCL's buffers are not included.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from pipeline.config import Method, Sharding, adapted_layers
from pipeline.doctor.fake_run import PHASES, Job, Size
from pipeline.models.sharding import STRATEGIES

_FEW, _MORE = 2, 4  # layers of the two models that are measured; half of the layers have sliding attention
_NEIGHBOURS = 2  # layers to add if parameters are gathered: then a layer and its neighbours are in memory together
_AT_ONCE = 2  # each measurement uses one CPU core and up to 2 GB of memory
_LIMIT = 600  # seconds; a measurement takes 10 to 20 on an idle core
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ACCELERATE_")
"""Prefixes of the variables that launchers set for their processes. A measurement is not one of these processes."""


@dataclass(frozen=True)
class Peaks:
    """The most bytes that one GPU holds in each phase of training.

    Attributes:
        load: after the model has been placed on the GPU.
        forward: in the forward pass, including the loss.
        backward: in the backward pass.
        optimizer: while gradients are clipped and weights change.
    """

    load: int
    forward: int
    backward: int
    optimizer: int

    @property
    def highest(self) -> int:
        """The most bytes in any phase."""
        return max(vars(self).values())


@dataclass(frozen=True)
class NotMeasured:
    """A job that could not be measured. `reason` completes the sentence 'The memory is estimated, because …'."""

    reason: str


def measure(jobs: Sequence[Job]) -> list[Peaks | NotMeasured]:
    """Measure the peaks of each job, in the order of the jobs."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_measure, jobs))


def _measure(job: Job) -> Peaks | NotMeasured:
    if STRATEGIES[job.sharding].package:
        return NotMeasured(f"sharding={job.sharding.name} cannot run without a GPU")
    sizes = _sizes(job)
    # Without sharding, each process holds the whole model, so one process is measured alone.
    measured = replace(job, processes=1) if job.sharding is Sharding.none else job
    command = [sys.executable, "-m", "pipeline.doctor.fake_run"]
    request = pickle.dumps((measured, sizes))
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, env=_environment(), timeout=_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return NotMeasured(f"measuring took more than {_LIMIT} seconds")
    if done.returncode:
        return NotMeasured(f"measuring failed: {_last_line(done.stderr.decode(errors='replace'))}")
    found: list[dict[str, int]] = pickle.loads(done.stdout)
    return Peaks(**{phase: _extrapolate([each[phase] for each in found], sizes, job) for phase in PHASES})


def _sizes(job: Job) -> list[Size]:
    """Choose the sizes of models to measure.

    A small model is measured whole. Otherwise two smaller models are measured, and a third one if some layers have no
    adapters.
    """
    whole = _whole(job)
    more = _NEIGHBOURS if STRATEGIES[job.sharding].gathers else 0
    few, most = _FEW + more, _MORE + more
    if whole.layers <= most:
        return [whole]
    partly = [Size(most, few)] if whole.adapted < whole.layers else []
    return [Size(few, few), Size(most, most), *partly]


def _whole(job: Job) -> Size:
    layers = int(job.model["num_hidden_layers"])
    is_adapted = job.train.method is Method.lora
    return Size(layers, len(adapted_layers(job.train.lora, layers)) if is_adapted else layers)


def _extrapolate(found: list[int], sizes: list[Size], job: Job) -> int:
    """Extrapolate to the whole model.

    Each layer with adapters adds the same number of bytes. Each layer without adapters adds another fixed number.
    """
    if len(sizes) == 1:
        return found[0]
    whole = _whole(job)
    few, more, *partly = found
    step = sizes[1].layers - sizes[0].layers
    per_adapted = (more - few) / step
    per_other = (partly[0] - few) / step if partly else 0.0
    return round(few + per_adapted * (whole.adapted - sizes[0].adapted) + per_other * (whole.layers - whole.adapted))


def _environment() -> dict[str, str]:
    """Return the environment of the measuring process.

    The variables of launchers are removed. PYTHONPATH is this process's import path. Only the first GPU is visible.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": first_gpu}


def _last_line(text: str) -> str:
    """Return the last line of a traceback, which names the error."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    return lines[-1].strip()[:300] if lines else "it wrote no message"
