"""Pretend that this process has a GPU, to measure or test what the program would do on a real one.

`install` lets a CPU build of torch handle fake tensors on device cuda. `pretend_cuda` makes `torch.cuda` answer as if
there were GPUs. Both change the whole process, so use them in a process of their own.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

_SOURCE = Path(__file__).with_name("noop_cuda.cpp")


class NoFakeGpuError(Exception):
    """The fake GPU cannot be installed. The text says why."""


@dataclass(frozen=True)
class FakeProperties:
    """The properties of each fake GPU, as `torch.cuda.get_device_properties` returns them. Memory is in bytes."""

    name: str = "fake H100"
    major: int = 9
    minor: int = 0
    total_memory: int = 85 * 10**9
    multi_processor_count: int = 132


def install() -> None:
    """Let this process handle fake tensors on device cuda. Call this right after `import torch`.

    A build of torch with CUDA needs no change. For a CPU build, a small library is compiled once and cached.

    Raises:
        NoFakeGpuError: there is no C++ compiler, the compiler fails, or this version of torch is not supported.
    """
    if torch.backends.cuda.is_built():
        return
    if ctypes.CDLL(str(_compile())).install() == 2:
        raise NoFakeGpuError(f"torch {torch.__version__} does not accept another CUDA interface")


def _compile() -> Path:
    """Return the compiled library. Its name depends on the source and on the version of torch."""
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    directory = Path(tempfile.gettempdir()) / f"gpt-oss-qat-{os.getuid()}"
    library = directory / f"noop_cuda_{key}.so"
    if library.is_file():
        return library
    directory.mkdir(mode=0o700, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    root = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", str(_SOURCE), "-o", str(partial)]
    command += [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoFakeGpuError(f"no C++ compiler: {compiler} cannot be started ({error.strerror})") from error
    if done.returncode:
        raise NoFakeGpuError(f"{compiler} failed: {done.stderr.strip()[:300]}")
    partial.rename(library)
    return library


class FakeStream:
    """A fake CUDA stream or event. Its work is always finished."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "FakeStream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        """Return True: all work has finished."""
        return True

    def is_capturing(self) -> bool:
        """Return False: no CUDA graph is captured."""
        return False

    def record_event(self, *_: object) -> "FakeStream":
        """Return a new event."""
        return FakeStream()

    def record(self, *_: object) -> None:
        """Do nothing. The aliases below do nothing either."""

    wait = wait_event = wait_stream = synchronize = record


@contextmanager
def pretend_cuda(count: int = 1, properties: FakeProperties | None = None) -> Iterator[None]:
    """Make `torch.cuda` answer as if this machine had `count` GPUs. Nothing is computed on them."""
    each = properties or FakeProperties()
    with (
        patch.multiple(torch.cuda, **_answers(count, each)),
        patch.object(torch.nn.Module, "_apply", _apply),
    ):
        yield


def _answers(count: int, each: FakeProperties) -> dict[str, Any]:
    constants: dict[str, object] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": count,
        "current_device": 0,
        "get_device_capability": (each.major, each.minor),
        "get_device_properties": each,
        "get_device_name": each.name,
        "mem_get_info": (each.total_memory, each.total_memory),
        "max_memory_allocated": 0,
        "memory_allocated": 0,
    }
    silent = ("_lazy_init", "empty_cache", "ipc_collect", "reset_peak_memory_stats", "synchronize", "set_device")
    seeds = ("manual_seed", "manual_seed_all")
    made = dict.fromkeys(("Stream", "Event", "stream", "current_stream", "default_stream"), FakeStream)
    return {
        **{name: _constant(value) for name, value in constants.items()},
        **{name: _constant(None) for name in (*silent, *seeds)},
        **made,
    }


def _constant(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def _apply(
    module: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """Replace `Module._apply`. The original swaps a tensor's contents, which fake tensors do not allow."""
    for each in module.modules() if recurse else (module,):
        for name, parameter in each._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                new = fn(parameter.data)
            if new.device != parameter.device or new.dtype != parameter.dtype:
                each._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
        for name, buffer in each._buffers.items():
            each._buffers[name] = buffer if buffer is None else fn(buffer)
    return module
