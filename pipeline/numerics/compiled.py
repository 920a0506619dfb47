"""Decides when kernels are compiled. The same function runs eagerly or through torch.compile, with the same bits.

torch.compile fuses a function into one loop over memory (C++ on a CPU, Triton on a GPU), which is about ten times
faster. Compiling takes seconds per function. The first time on a machine, it takes half a minute. So a function runs
eagerly at first. It is compiled after it has processed enough values for this to pay off. If no compiler works, all
functions stay eager and a warning is given.
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
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_PAYS_AFTER = 1 << 27  # values; converting them eagerly takes about 4 s on two CPU cores, as compiling a function does
_PAYS_AT_ONCE = 1 << 29  # values of a job; converting them eagerly takes longer than compiling all kernels (warm cache)
_MOST_VARIANTS = 64  # combinations of shape, type and rule; beyond the limit (default: 8), torch silently runs eagerly
_WORTH_COUNTING = 1 << 16  # values; for smaller tensors, most time goes into the call, which compiling does not shorten
_OPTIONS: dict[str, dict[str, bool | int]] = {
    # Trust the instruction sets that the processor reports. torch 2.13 would test each one, which takes 2 s per run.
    # Round to BF16 wherever the eager function does. By default, torch.compile would skip some of these roundings.
    "cpu": {"cpp.vec_isa_ok": True, "emulate_precision_casts": True},
    # Round like a CPU: no fused multiply-add, no approximate division, no flushing of subnormals to zero.
    "cuda": {
        "emulate_precision_casts": True,
        "eager_numerics.division_rounding": True,
        "eager_numerics.disable_ftz": True,
    },
}
"""Options of torch.compile for each type of device."""
_RECOMPUTES = {f"realize_{limit}_threshold": 1 << 40 for limit in ("opcount", "reads", "acc_reads")}
"""Options for GPUs. With them, inductor stores no intermediate value: each launch computes it again if needed."""

Result = TypeVar("Result")


class Compilation(Enum):
    """Rule for compiling kernels."""

    when_it_pays = "when_it_pays"
    never = "never"
    always = "always"


_mode = Compilation.when_it_pays
_gave_up = False


@contextmanager
def compilation(mode: Compilation) -> Iterator[None]:
    """Inside a `with` block, compile kernels as `mode` says. This is for tests and measurements."""
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = Compilation.never if _gave_up else before


def compilation_for(values: int) -> AbstractContextManager[None]:
    """Compile each kernel at its first call inside a `with` block, if the block processes enough values."""
    is_large = _mode is Compilation.when_it_pays and values >= _PAYS_AT_ONCE
    return compilation(Compilation.always) if is_large else nullcontext()


class Kernel(Generic[Result]):
    """A pure function of tensors that runs eagerly or compiled.

    A kernel that another kernel calls is compiled as a part of the caller.
    """

    def __init__(self, function: Callable[..., Result], *, recomputes: bool = False) -> None:
        """Wrap a function.

        Args:
            function: the function. Its first argument is a tensor. The size and device of this tensor decide when the
                function is compiled.
            recomputes: if True, the compiled code stores no values between its launches on a GPU.
        """
        functools.update_wrapper(self, function)
        self._function = function
        self._recomputes = recomputes
        self._values_seen = 0
        self._compiled: dict[tuple[str, bool], Callable[..., Result]] = {}

    def __call__(self, values: Tensor, *others: object) -> Result:
        """Run the function. Compile it first if this pays off."""
        if torch.compiler.is_compiling():
            return self._function(values, *others)
        with torch.no_grad():  # compiled code is valid for one grad mode only; gradients are defined in the codec
            found = self._run_compiled(values, *others)
            return self._function(values, *others) if found is None else found

    def run_compiled(self, values: Tensor, *others: object) -> Result | None:
        """Run the function compiled. Return None if this does not pay off yet, or if no compiler works."""
        with torch.no_grad():
            return self._run_compiled(values, *others)

    def _run_compiled(self, values: Tensor, *others: object) -> Result | None:
        self._values_seen += values.numel() if values.numel() >= _WORTH_COUNTING else 0
        if not _is_compiled(values.device.type, self._values_seen):
            return None
        # Weights have few shapes: the kernel is compiled for each, because a loop of known length is three times
        # faster. Activations have many shapes: the kernel is compiled once, with dynamic shapes.
        try:
            return self._compile(values.device.type, is_dynamic=values.stride(-1) != 1)(values, *others)
        except (OSError, RuntimeError) as error:
            if not _is_compiler_error(error):
                raise
            _give_up(error)
            return None

    def _compile(self, device_type: str, is_dynamic: bool) -> Callable[..., Result]:
        """Return the compiled function. It is made on demand, because torch.compile takes three seconds to import."""
        key = (device_type, is_dynamic)
        if key not in self._compiled:
            compile_for: Any = torch.compile  # some overloads in the types of torch 2.13 lack recompile_limit
            options = dict(_OPTIONS.get(device_type, _OPTIONS["cuda"]))
            if self._recomputes and device_type != "cpu":
                options |= _RECOMPUTES
            self._compiled[key] = compile_for(
                self._function, dynamic=is_dynamic, recompile_limit=_MOST_VARIANTS, options=options
            )
        return self._compiled[key]


def kernel(function: Callable[..., Result]) -> Kernel[Result]:
    """Decorate a pure function of tensors, so that it runs eagerly or compiled.

    The function may only use operations that are exact or correctly rounded by IEEE 754. It must not have a sum
    whose result depends on the order of summation.
    """
    return Kernel(function)


def recomputing_kernel(function: Callable[..., Result]) -> Kernel[Result]:
    """Decorate a function like `kernel`. On a GPU, the compiled code stores no values between its launches."""
    return Kernel(function, recomputes=True)


@functools.cache
def can_compile(device_type: str) -> bool:
    """Return whether there is a compiler for a type of device, `cpu` or `cuda`. Warn once if there is none."""
    if device_type == "cuda":
        found = importlib.util.find_spec("triton") is not None
    else:
        found = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
    if not found:
        wanted = "Triton" if device_type == "cuda" else "C++ compiler (g++ or clang++)"
        warnings.warn(f"no {wanted}: conversions run uncompiled, about ten times slower", stacklevel=4)
    return found


def _is_compiled(device_type: str, values_seen: int) -> bool:
    if _mode is Compilation.never or (_mode is Compilation.when_it_pays and values_seen < _PAYS_AFTER):
        return False
    return can_compile(device_type)


def _is_compiler_error(error: Exception) -> bool:
    """Return whether the compiler failed. An OSError means that torch.compile could not write its cache."""
    dynamo = sys.modules.get("torch._dynamo")
    return isinstance(error, OSError) or (dynamo is not None and isinstance(error, dynamo.exc.TorchDynamoException))


def _give_up(error: Exception) -> None:
    global _mode, _gave_up
    _mode, _gave_up = Compilation.never, True
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    warnings.warn(
        f"torch.compile failed, conversions continue uncompiled, about ten times slower: {first}", stacklevel=3
    )
