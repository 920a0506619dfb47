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
from dataclasses import dataclass, replace

from pipeline.config import Method, Sharding, adapted_layers
from pipeline.doctor.fake_run import PHASES, Job, Outcome, Size
from pipeline.models.sharding import STRATEGIES
from pipeline.runs.processes import module_command

_FEW, _MORE = 2, 4  # layers of the two models that are measured; half of the layers have sliding attention
_NEIGHBOURS = 2  # layers to add if parameters are gathered: then a layer and its neighbours are in memory together
_LIMIT = 600  # seconds; a measurement takes 10 to 20 on an idle core
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ACCELERATE_")
"""Prefixes of the variables that launchers set for their processes. The measuring process must not have them."""


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
    can_run = [job for job in jobs if STRATEGIES[job.sharding].package is None]
    found = iter(_run(can_run) if can_run else [])
    return [
        next(found)
        if STRATEGIES[job.sharding].package is None
        else NotMeasured(f"sharding={job.sharding.name} cannot run without a GPU")
        for job in jobs
    ]


def _run(jobs: Sequence[Job]) -> list[Peaks | NotMeasured]:
    """Measure jobs in a process that pretends to have a GPU."""
    # Without sharding, each process holds the whole model, so one process is measured alone.
    requests = [(replace(job, processes=1) if job.sharding is Sharding.none else job, _sizes(job)) for job in jobs]
    command, limit = module_command("pipeline.doctor.fake_run"), _LIMIT * len(jobs)
    try:
        done = subprocess.run(
            command, input=pickle.dumps(requests), capture_output=True, env=_environment(), timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return [NotMeasured(f"measuring took more than {limit} seconds")] * len(jobs)
    if done.returncode:
        return [NotMeasured(f"measuring failed: {_last_line(done.stderr.decode(errors='replace'))}")] * len(jobs)
    outcomes: list[Outcome] = pickle.loads(done.stdout)
    return [_peaks(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]


def _peaks(job: Job, outcome: Outcome) -> Peaks | NotMeasured:
    if isinstance(outcome, str):
        return NotMeasured(f"measuring failed: {outcome}")
    return Peaks(**{phase: _extrapolate([each[phase] for each in outcome], _sizes(job), job) for phase in PHASES})


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
    layers = job.model["num_hidden_layers"]
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
