"""A GPU that runs the codec's Triton kernels with Triton's interpreter, on the CPU.

Inductor compiles a function of the codec as for a GPU, from fake tensors on device cuda. Each fake tensor stands for
memory of the CPU. When inductor's code launches a kernel, the interpreter runs the kernel on this memory. The rest of
the codec runs on CPU tensors.

The interpreter needs TRITON_INTERPRET=1 before the import of Triton, and it changes the whole process, so use a process
of its own. The interpreter of Triton 3.7 lacks some instructions or computes them differently from a GPU.
`_correct_interpreter` replaces these. Kernels that multiply matrices are not supported.
"""

import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kernels_for_gpus import prepare
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from pipeline.numerics import slabs
from pipeline.numerics.compiled import Kernel

Edit = Callable[[str], str]


class InterpretedGpu:
    """Runs the compiled functions of the codec. There can be only one in a process.

    Attributes:
        launches: names of the kernels that ran.
        edit: changes the source of each Triton kernel before it runs.
    """

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.edit: Edit = lambda source: source
        self._memory: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._pretended = prepare()
        self._mode = FakeTensorMode()
        _correct_interpreter()
        self._replace_launcher()
        self._replace_kernels()

    def _replace_launcher(self) -> None:
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner

        tuner: Any = CachingAutotuner
        compiler: Any = AsyncCompile
        load = compiler.triton
        tuner.run = lambda kernel, *args, **_: self._launch(kernel, args)
        compiler.triton = lambda compiler, name, source, **kwargs: load(compiler, name, self.edit(source), **kwargs)

    def _replace_kernels(self) -> None:
        """Let the codec convert whole stacks, as on a GPU, with functions that are compiled for it."""
        slabs.ONLY_SLABS = frozenset()
        codec: Any = Kernel
        compile_for = codec._compile
        codec._compile = lambda kernel, _, is_dynamic: functools.partial(
            self._call, compile_for(kernel, "cuda", is_dynamic)
        )

    def _call(self, function: Callable[..., Any], *args: object) -> Any:
        with self._mode:
            return tree_map(self._on_cpu, function(*tree_map(self._on_gpu, args)))

    def _launch(self, kernel: Any, args: tuple[Any, ...]) -> None:
        """Run a kernel with the largest tiles that inductor would try, because the interpreter is slow per tile."""
        self.launches.append(kernel.inductor_meta["kernel_name"])
        choice = max(kernel.configs, key=lambda each: math.prod(each.kwargs.values()))
        with _disable_current_modes():
            on_cpu, grid = kernel._interpret_args_grid(tuple(map(self._on_cpu, args)), choice)
            kernel.fn[grid](*on_cpu, **choice.kwargs)

    def _on_gpu(self, value: Any) -> Any:
        """Return a fake tensor for a CPU tensor."""
        if not isinstance(value, Tensor):
            return value
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        self._stand_for(fake, value.untyped_storage(), int(value.storage_offset()))
        return fake

    def _on_cpu(self, value: Any) -> Any:
        """Return the memory of a fake tensor as a CPU tensor."""
        if not isinstance(value, Tensor):
            return value
        with _disable_current_modes():
            if value.untyped_storage()._cdata not in self._memory:
                poison = torch.full((value.untyped_storage().nbytes(),), 0x7F, dtype=torch.uint8)
                self._stand_for(value, poison.untyped_storage(), 0)
            storage, start = self._memory[value.untyped_storage()._cdata]
            empty = torch.empty(0, dtype=value.dtype)
            return empty.set_(storage, start + value.storage_offset(), value.shape, value.stride())

    def _stand_for(self, fake: Tensor, storage: torch.UntypedStorage, start: int) -> None:
        key = fake.untyped_storage()._cdata
        self._memory[key] = storage, start
        weakref.finalize(fake.untyped_storage(), self._memory.pop, key)


def _correct_interpreter() -> None:
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    libdevice.copysign = _with_numpy(np.copysign)  # the interpreter has no functions of libdevice
    libdevice.nearbyint = _with_numpy(np.rint)
    interpreter._convert_float = _convert
    interpreter.ReduceOps.generic_reduce = _reduce


def _with_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    def run(*args: Any) -> Any:
        found = function(*(each.handle.data for each in args))
        scalar = args[0].type.scalar
        return language.tensor(TensorHandle(found, scalar), language.block_type(scalar, list(found.shape)))

    return run


def _convert(values: Any, from_type: Any, to_type: Any, _: object) -> Any:
    """Convert between float32 and bfloat16, to the nearest value. The interpreter truncates."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    bits = {"fp32": torch.uint32, "bf16": torch.uint16}[to_type.name]
    given = torch.from_numpy(np.ascontiguousarray(values)).view(types[from_type.name])
    return given.to(types[to_type.name]).view(bits).numpy()


def _reduce(operation: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Reduce one tensor along an axis, half by half. The interpreter would take a second for each thousand values."""
    (values,) = inputs
    found, axis = values, operation.axis
    while found.handle.data.shape[axis] > 1:
        halves = np.split(found.handle.data, 2, axis)
        found = operation.combine_fn.fn(*(operation.to_tensor(half, values.dtype) for half in halves))
    data = found.handle.data
    return [operation.to_tensor(data if operation.keep_dims else data.squeeze(axis), values.dtype)]
