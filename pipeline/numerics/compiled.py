"""When the arithmetic is compiled: the same functions run eagerly or through torch.compile, with the same bits.

torch.compile fuses a function into one loop over memory (C++ on a CPU, Triton on a GPU), some ten times faster. It
costs seconds a function, and half a minute the first time on a machine, so each is eager until so many values have
passed through it that compiling would have paid; all stay eager, with a warning, where no compiler works.
"""

import functools
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, TypeVar

import torch
from torch import Tensor

_PAYS_AFTER = 1 << 27  # values: some 4 s of eager work on two CPU cores, about what compiling a function takes
_PAYS_AT_ONCE = 1 << 29  # values of a whole job: eagerly that is longer than compiling all that it needs, once cached
_MOST_VARIANTS = 64  # of shapes, types and rules; torch's own limit, 8, would silently go back to eager
_WORTH_COUNTING = 1 << 16  # values: below, the time is that of calls, which compiling does not shorten
_OPTIONS = {"cpp.vec_isa_ok": True}
"""Take the processor's word for its instruction sets: torch 2.13 tries each in a new Python, 2 s of every run."""

Result = TypeVar("Result")


class Compilation(Enum):
    """When kernels are compiled."""

    when_it_pays = "when_it_pays"
    never = "never"
    always = "always"


_mode = Compilation.when_it_pays
_gave_up = False


@contextmanager
def compilation(mode: Compilation) -> Iterator[None]:
    """Decide inside the block when kernels are compiled; for tests and measurements."""
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = Compilation.never if _gave_up else before


def compilation_for(values: int) -> AbstractContextManager[None]:
    """For a job of so many values inside the block: compile from the start if it is large enough."""
    is_large = _mode is Compilation.when_it_pays and values >= _PAYS_AT_ONCE
    return compilation(Compilation.always) if is_large else nullcontext()


def kernel(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a pure function of tensors: eager or compiled, as the mode and the amount of work say.

    Only operations that are exact, or correctly rounded by IEEE 754, may be in it, and no sum whose order matters.
    """
    values_seen = 0

    @functools.cache  # torch.compile imports three seconds' worth of modules
    def compiled(is_dynamic: bool) -> Callable[..., Result]:
        compile_for: Any = torch.compile  # recompile_limit is documented, but in torch 2.13 not in every typed overload
        return compile_for(function, dynamic=is_dynamic, recompile_limit=_MOST_VARIANTS, options=_OPTIONS)

    @functools.wraps(function)
    @torch.no_grad()  # compiled code is valid for one grad mode; gradients are the business of the codec
    def run(values: Tensor, *others: object) -> Result:
        nonlocal values_seen
        values_seen += values.numel() if values.numel() >= _WORTH_COUNTING else 0
        if not _is_compiled(values.device.type, values_seen):
            return function(values, *others)
        # Shapes of weights are few, and a loop of known length is three times faster; those of activations are many.
        try:
            return compiled(is_dynamic=values.stride(-1) != 1)(values, *others)
        except (OSError, RuntimeError) as error:
            if not _is_the_compilers(error):
                raise
            _give_up(error)
            return function(values, *others)

    return run


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether there is a compiler for this type of device, `cpu` or `cuda`; warns, once, if there is none."""
    if device_type == "cuda":
        found = importlib.util.find_spec("triton") is not None
    else:
        found = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    if not found:
        wanted = "Triton" if device_type == "cuda" else "C++ compiler (g++ or clang++)"
        warnings.warn(f"no {wanted}: conversions run uncompiled, some ten times slower", stacklevel=4)
    return found


def _is_compiled(device_type: str, values_seen: int) -> bool:
    if _mode is Compilation.never or (_mode is Compilation.when_it_pays and values_seen < _PAYS_AFTER):
        return False
    return can_compile(device_type)


def _is_the_compilers(error: Exception) -> bool:
    """Whether a compiler does not work, or its cache cannot be written, which fails the import of torch._dynamo."""
    dynamo = sys.modules.get("torch._dynamo")
    return isinstance(error, OSError) or (dynamo is not None and isinstance(error, dynamo.exc.TorchDynamoException))


def _give_up(error: Exception) -> None:
    global _mode, _gave_up
    _mode, _gave_up = Compilation.never, True
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    warnings.warn(f"torch.compile failed, conversions go on uncompiled, some ten times slower: {first}", stacklevel=3)
