"""Run one stage: measure only its own memory, free the memory afterwards, and explain failures of the machine.

This module does not import torch. It uses torch only if a stage has imported it.
"""

import errno
import gc
import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline.config import PipelineConfig
from pipeline.errors import MachineError
from pipeline.runs import commands, up_to_date
from pipeline.runs.memory_remedies import remedies

if TYPE_CHECKING:
    from pipeline.runs.artifacts import Artifact

_NO_KERNEL = "no kernel image is available"
_DISK_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS), "written"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "read or written"),
}
_WRITE_OF_TORCH = re.compile(
    r"PytorchStreamWriter|inline_container\.cc:\d+\] \. (unexpected pos|open file failed)|iostream error"
)
_FILE_OF_RUST = re.compile(r"\(os error (\d+)\)")
"""End of the messages of safetensors and tokenizers, which raise no OSError."""
_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_ASKED = re.compile(r"(?:Tried to allocate|you tried to allocate) ([\d.]+ ?\w+)")
_FREE = re.compile(r"GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def run_stage(config: PipelineConfig) -> "Artifact":
    """Run the stage that the configuration names, as `one_stage` does, and return its artifact."""
    with one_stage(config):
        importlib.import_module("pipeline.runs.artifacts").take_read()  # artifacts that another stage has read
        artifact: Artifact = importlib.import_module(f"pipeline.stages.{config.stage.name}").run(config)
    return artifact


@contextmanager
def one_stage(config: PipelineConfig) -> Iterator[None]:
    """Run the block as the stage that the configuration names.

    The peak of GPU memory is reset, so artifact.json reports the stage's own peak. After the block, the models of the
    stage are freed: `all` runs several stages in one process. A stage that was up to date has loaded none.

    Raises:
        MachineError: the memory was too small, a file could not be written, or a GPU has no kernels.
    """
    _reset_peaks()
    up_to_date.begin()
    try:
        yield
    except Exception as error:
        explanation = explain(error, config)
        if explanation is None:
            raise
        raise MachineError(explanation) from error
    if not up_to_date.is_reported():
        release()


def release() -> None:
    """Free models that nothing uses any more. They have reference cycles, so only garbage collection frees them."""
    _forget_import_errors()
    gc.collect()
    if (cuda := _cuda()) is not None:
        cuda.empty_cache()


def _forget_import_errors() -> None:
    """Drop the tracebacks that pulp 3.3 keeps.

    ModelOpt 0.47 imports pulp. For each solver that is not installed, pulp stores the error in the solver's class. The
    traceback of this error keeps the variables of all functions that were running. ModelOpt is imported while
    `quantize` runs. So the tracebacks would keep the model of `quantize` in memory until the program ends.
    """
    solvers = sys.modules.get("pulp.apis")
    for module in [] if solvers is None else [*vars(solvers).values()]:
        for solver in vars(module).values() if isinstance(module, ModuleType) else ():
            error = vars(solver).get("err") if isinstance(solver, type) else None
            if isinstance(error, Exception):
                error.__traceback__ = None


def _reset_peaks() -> None:
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def _cuda() -> Any:
    """Return torch.cuda if this process uses a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def explain(error: Exception, config: PipelineConfig) -> str | None:
    """Return a message with cause and remedy if the machine failed. Return None for any other error."""
    text, stage = str(error), config.stage.name
    if (failure := _find_disk_error(error)) is not None:
        return f"stage={stage}: {failure}. Check the disk of run_dir={config.run_dir}. Then go on: {commands.resume()}"
    if not isinstance(error, (MemoryError, RuntimeError)):
        return None
    if _NO_KERNEL in text:
        return (
            f"stage={stage}: this build of torch has no kernels for the GPU ({_NO_KERNEL}). Install a build of torch"
            " for it, or hide the GPU: CUDA_VISIBLE_DEVICES=''."
        )
    on_gpu = any(phrase in text for phrase in _GPU_MEMORY)
    if not on_gpu and not isinstance(error, MemoryError) and not any(phrase in text for phrase in _HOST_MEMORY):
        return None
    where = "GPU memory" if on_gpu else "host memory"
    found = remedies(config, on_gpu)
    advice = f"Set {', '.join(found)}, or use" if found else "Use"
    larger = "a GPU with more memory" if on_gpu else "a machine with more memory"
    return f"stage={stage} ran out of {where}{_amounts(text, on_gpu)}. {advice} {larger}."


def _find_disk_error(error: Exception) -> str | None:
    """Say which file could not be read or written, and why. Return None for any other error."""
    if _WRITE_OF_TORCH.search(str(error)):
        return "torch could not write a file; the disk may be full"
    found = _FILE_OF_RUST.search(str(error))
    number, file = (error.errno, error.filename) if isinstance(error, OSError) else (found and int(found[1]), None)
    if number not in _DISK_ERRORS:
        return None
    return f"{file or 'a file'} could not be {_DISK_ERRORS[number]} ({os.strerror(number)})"


def _amounts(text: str, on_gpu: bool) -> str:
    """Say how much memory was asked for and how much was free. Example: `: it asked for 2.00 GiB more, …`."""
    asked, free = _ASKED.search(text), _FREE.search(text)
    parts = [f"it asked for {_readable(asked[1])} more"] if asked else []
    if on_gpu and free:
        parts.append(f"{free[3]} of {free[2]} were free on GPU {free[1]}")
    elif not on_gpu:
        from pipeline.runs.host_memory import available_bytes

        parts.append(f"{available_bytes() / 2**30:.2f} GiB are free")
    return f": {', and '.join(parts)}" if parts else ""


def _readable(amount: str) -> str:
    """Convert bytes to GiB: `2147483648 bytes` becomes `2.00 GiB`. torch uses this form in its messages for GPUs."""
    number, unit = re.fullmatch(r"([\d.]+) ?(\w+)", amount).groups()  # type: ignore[union-attr]
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else f"{number} {unit}"
