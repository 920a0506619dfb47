"""Check, before a stage begins, that the machine and the launcher fit the command.

The checks take a `Machine`, so that tests can describe machines that do not exist. Only `Machine.read` looks at the
real machine.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.config import Device, PipelineConfig, Precision, QuantizeSource, Stage, TrainConfig
from pipeline.errors import Attempts, MachineError, user_errors
from pipeline.runs import gpus, tracking
from pipeline.runs.console import warn
from pipeline.runs.gpus import Gpu
from pipeline.runs.processes import has_launcher, local_process_count

NO_GPU = "device=cuda: no GPU is visible here. Use device=auto or device=cpu."
_BF16_CAPABILITY = (8, 0)
_SIZES_DIFFER = 1.05  # GPUs of one model report sizes that differ by less than this factor
FindMore = Callable[[PipelineConfig, bool], list[str]]
_TRAINED = {Stage.sft: ("sft",), Stage.qat: ("qat",), Stage.controls: ("sft", "qat"), Stage.all: ("sft", "qat")}
"""For each stage that trains, the configuration sections with its training settings."""


@dataclass(frozen=True)
class Machine:
    """The facts that the checks use.

    Attributes:
        gpus: the GPUs that this process may use.
        local_processes: number of processes on this machine.
        has_launcher: whether a launcher started this process.
        architectures: the GPU architectures that torch has kernels for (`sm_90`, `compute_90`); empty without CUDA.
        torch: torch's version.
        environment: the environment variables, for the settings of accelerate's launcher.
    """

    gpus: tuple[Gpu, ...] = ()
    local_processes: int = 1
    has_launcher: bool = False
    architectures: tuple[str, ...] = ()
    torch: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls) -> "Machine":
        """Read the facts of this machine and this process."""
        import torch

        return cls(
            gpus.visible(),
            local_process_count(),
            has_launcher(),
            tuple(torch.cuda.get_arch_list()) if torch.backends.cuda.is_built() else (),
            str(torch.__version__),
            os.environ,
        )


def check(config: PipelineConfig, find_more: FindMore | None = None) -> None:
    """Check the tracker's package, this machine and the launcher. Warn of GPUs whose sizes differ.

    The checks of the machine run if the stage trains, a launcher started the process, or device=cuda is set. Other
    commands skip them, because they import torch, which takes time.

    Args:
        config: the configuration.
        find_more: returns further problems of a command that trains, and takes two arguments: the configuration, and
            whether the machine and the launcher fit. All problems are reported together.

    Raises:
        UserError: the tracker's package is not installed, a GPU is missing, the number of processes does not fit the
            GPUs, the GPUs lack the arithmetic of `precision`, the launcher contradicts the configuration, or
            `find_more` has found problems.
        MachineError: torch has no kernels for a GPU.
    """
    trains = config.stage in _TRAINED
    tracker = Attempts()
    tracker.attempt(lambda: tracking.raise_if_not_installed(config.tracking.backend))
    if not trains:
        tracker.raise_if_any()
    if trains or has_launcher() or config.device is Device.cuda:
        machine = Machine.read()
        found = problems(config, machine)
        if trains and find_more is not None:
            found += find_more(config, not found)
        if found := list(dict.fromkeys([*tracker.problems, *found])):
            raise user_errors(found)
        raise_if_no_kernels(machine)
        if (trains or config.stage is Stage.doctor) and (difference := unequal_sizes(machine)):
            warn(config.stage.name, difference)


def problems(config: PipelineConfig, machine: Machine) -> list[str]:
    """Return a message for each mistake. It names the remedy."""
    trained = _trained(config)
    found = [*_device_problems(config.device, machine), *_process_problems(machine, is_training=bool(trained))]
    if trained:
        found += [*_precision_problems(trained, machine), *_launcher_problems(trained, machine)]
    return found


def _trained(config: PipelineConfig) -> dict[str, TrainConfig]:
    """Return the training settings that the stage uses, keyed by the name of their section."""
    found: dict[str, TrainConfig] = {name: getattr(config, name) for name in _TRAINED.get(config.stage, ())}
    if config.stage is Stage.all and config.quantize.source != QuantizeSource.sft:
        del found["sft"]  # skipped
    return found


def _device_problems(device: Device, machine: Machine) -> Iterator[str]:
    if device is Device.cuda and not machine.gpus:
        yield NO_GPU if machine.architectures else f"{NO_GPU} (torch {machine.torch} is built without CUDA.)"


def _process_problems(machine: Machine, is_training: bool) -> Iterator[str]:
    count, processes = len(machine.gpus), machine.local_processes
    if count and processes > count:
        yield (
            f"{processes} processes were started on this machine, but {_gpus(count)} visible. Start one"
            f" process per GPU: scripts/launch --processes {count} …, or torchrun --nproc-per-node {count} …."
        )
    if count > 1 and is_training and not machine.has_launcher:
        yield (
            f"{count} GPUs are visible, but there is one process, which trains on only one GPU. Start one process"
            " per GPU with scripts/launch (or torchrun), or choose one GPU: CUDA_VISIBLE_DEVICES=0."
        )


def _precision_problems(trained: Mapping[str, TrainConfig], machine: Machine) -> Iterator[str]:
    old = [gpu for gpu in machine.gpus if gpu.capability < _BF16_CAPABILITY]
    if not old:
        return
    for name, train in trained.items():
        if train.precision is not Precision.fp32:
            yield (
                f"{name}.precision={train.precision.name}: {_described(old[0])} has no BF16 arithmetic, which needs"
                f" compute capability 8.0. Use a newer GPU, or {name}.precision=fp32. FP32 weights take twice the"
                " memory of BF16 weights."
            )


def _launcher_problems(trained: Mapping[str, TrainConfig], machine: Machine) -> Iterator[str]:
    """Yield a message for each setting of `accelerate launch` that contradicts the configuration.

    The trainer would obey these settings. `sharding.raise_if_impossible` checks the launcher's sharding. The launcher's
    precision does not matter for mixed_bf16, because the trainer then sets BF16 itself.
    """
    launched = machine.environment.get("ACCELERATE_MIXED_PRECISION", "no")
    for name, train in trained.items():
        if launched != "no" and train.precision is not Precision.mixed_bf16:
            yield (
                f"{name}.precision={train.precision.name} means mixed precision 'no', but the launcher sets"
                f" {launched!r}. Use accelerate launch --mixed_precision no."
            )
    compiler = machine.environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() != "no":
        yield (
            f"the launcher compiles the model (dynamo_backend {compiler}), but compiled code may round"
            " less often than the export. Use accelerate launch --dynamo_backend no."
        )
    if machine.gpus and machine.environment.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes"):
        yield (
            f"the launcher sets use_cpu, but {_gpus(len(machine.gpus))} visible. Start without --cpu, or hide the"
            " GPUs: CUDA_VISIBLE_DEVICES=''."
        )


def raise_if_no_kernels(machine: Machine) -> None:
    """Raise MachineError if torch has no kernels for a GPU. Otherwise the first kernel would fail."""
    if not machine.architectures:
        return
    for gpu in machine.gpus:
        if not any(_runs_on(architecture, gpu.capability) for architecture in machine.architectures):
            raise MachineError(
                f"torch {machine.torch} has no kernels for {_described(gpu)}. It has kernels for"
                f" {', '.join(machine.architectures)}. Install a build of torch for this GPU, or hide the GPU with"
                " CUDA_VISIBLE_DEVICES."
            )


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs kernels for an architecture, such as `sm_90`, `sm_90a` or `compute_90`.

    Machine code (sm) runs on GPUs of the same major version and the same or a newer minor version. PTX (compute) can be
    compiled for every newer GPU. With the suffix `a`, both run only on exactly this version. With the suffix `f`, PTX
    has the limits of machine code.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if found is None:
        return True  # an unknown name does not prove that kernels are missing
    kind, major, minor, suffix = found[1], int(found[2]), int(found[3]), found[4]
    if suffix == "a":
        return capability == (major, minor)
    if kind == "sm" or suffix == "f":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)


def unequal_sizes(machine: Machine) -> str | None:
    """Return a warning if the GPUs of several processes have different sizes, else None."""
    sizes = sorted(gpu.total_bytes for gpu in machine.gpus)
    if machine.local_processes < 2 or not sizes or sizes[-1] < _SIZES_DIFFER * sizes[0]:
        return None
    return (
        f"the GPUs have {sizes[0] / 1e9:.0f} to {sizes[-1] / 1e9:.0f} GB of memory. Each holds the same share of the"
        " model, so the smallest one limits the run. Choose equal ones with CUDA_VISIBLE_DEVICES."
    )


def _described(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]})"


def _gpus(count: int) -> str:
    return "one GPU is" if count == 1 else f"{count} GPUs are"
