"""Pretend a GPU for the codec. Record the kernels that would run on it, and the code that Triton makes for them.

The codec runs on fake tensors on device cuda. Inductor compiles its functions as on a GPU, and Triton makes the code of
each architecture. Nothing is computed. `pretend` changes torch and Triton for the rest of the process, so it needs a
process of its own. This module uses internals of torch 2.13 and Triton 3.7.
"""

import atexit
import gc
import itertools
import re
import struct
import subprocess
import tempfile
import weakref
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.doctor import fake_gpu

fake_gpu.install()  # right after the import of torch

import triton  # noqa: E402
from triton.backends import Backend, backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import sm_arch_from_capability  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.cache import FileCacheManager  # noqa: E402

DISASSEMBLED = (80, 120)
"""Architectures for which ptxas makes machine code, which is then read: the oldest and the newest.

For the others, Triton stops at the PTX. Making and reading machine code takes longer than making the PTX.
"""
_INSTRUCTION = re.compile(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)", re.MULTILINE)
_MACHINE_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)", re.MULTILINE)


@dataclass(frozen=True)
class Properties(fake_gpu.FakeProperties):
    """The properties that inductor reads, with the values of an H100."""

    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    L2_cache_size: int = 50 * 2**20
    gcnArchName: str = ""
    is_integrated: bool = False
    clock_rate: int = 1755000
    memory_clock_rate: int = 2619000
    memory_bus_width: int = 5120


class _Driver:
    """Triton's driver for the pretended GPU."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_: object) -> int:
        return 0


class _Files(FileCacheManager):
    """Triton's cache of files. Only the code that `code_of` reads is written, and each file is written at once.

    Triton would print every intermediate module, and make a temporary directory for each file.
    """

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        path = Path(self._make_path(filename))
        is_read = path.suffix in (".ptx", ".cubin", ".json")
        path.write_bytes((data if isinstance(data, bytes) else data.encode()) if is_read else b"")
        return str(path)


@dataclass(frozen=True)
class Code:
    """The code of one Triton kernel for one architecture.

    Attributes:
        name: name of the kernel.
        architecture: number of the architecture, for example 90 for sm_90.
        ptx: the instructions of the PTX, with all their modifiers.
        binary: the bytes of the machine instructions. Empty for architectures that are not in DISASSEMBLED.
    """

    name: str
    architecture: int
    ptx: frozenset[str]
    binary: bytes


@dataclass
class Gpu:
    """Records what the pretended GPU would do.

    Attributes:
        architectures: architectures for which Triton makes code. If there are none, kernels are only counted.
        launches: how often each kernel was launched. Names of torch's own kernels begin with `aten`.
        codes: the code of all Triton kernels. A kernel that several graphs share appears once.
        index_bits: name of each launched kernel -> the width of its indices, 32 or 64 bits.
        live: bytes of all tensors on the GPU.
        peak: the largest value of `live`.
    """

    architectures: Sequence[int] = ()
    launches: Counter[str] = field(default_factory=Counter)
    codes: dict[tuple[str, int], Code] = field(default_factory=dict)
    index_bits: dict[str, int] = field(default_factory=dict)
    live: int = 0
    peak: int = 0

    def allocate(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def launch(self, kernel: Any) -> None:
        name = kernel.inductor_meta["kernel_name"]
        self.launches[name] += 1
        is_wide = "tl.int64" in kernel.fn.src
        self.index_bits[name] = max(self.index_bits.get(name, 0), 64 if is_wide else 32)

    def start(self) -> None:
        """Forget launches, index widths and the peak, but keep counting the tensors that exist."""
        self.launches.clear()
        self.index_bits.clear()
        self.peak = self.live


class _Watch(TorchDispatchMode):
    """Counts torch's own kernels, and follows the storages of all tensors on the GPU."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu, self._seen = gpu, set[int]()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let dynamo compile while this mode is active."""
        return True

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_cuda]
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if outputs and not is_view and "empty" not in str(func) and func is not torch.ops.aten.detach.default:
            self._gpu.launches[str(func)] += 1
        for output in outputs:
            self._follow(output.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            self._gpu.allocate(storage.nbytes())
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self._gpu.live -= nbytes


def pretend(gpu: Gpu) -> None:
    """Pretend a GPU until this process ends. Functions are compiled for it, and `gpu` records what would run."""
    pretended = prepare()
    _replace_compiler(gpu)
    pretended.enter_context(FakeTensorMode())
    pretended.enter_context(_Watch(gpu))


def prepare() -> ExitStack:
    """Let inductor compile for a GPU until this process ends. Nothing can run the kernels yet."""
    gc.disable()  # inductor makes millions of objects, and almost none are garbage in cycles
    pretended = ExitStack()
    atexit.register(pretended.close)
    pretended.enter_context(fake_gpu.pretend_cuda(properties=Properties()))
    _replace_cuda()
    _configure_inductor()  # imports inductor, which keeps the functions of CUDA that it finds, so replace those first
    fake_mode: Any = FakeTensorMode
    fake_mode.avoid_device_init = True  # as on a machine without GPUs
    return pretended


def _replace_cuda() -> None:
    """Replace the CUDA functions that inductor uses, except those that `fake_gpu` replaces."""
    cuda: Any = torch.cuda
    cuda._get_device_properties = lambda _: Properties()
    cuda._exchange_device, cuda._maybe_exchange_device = (lambda _: 0), (lambda _: 0)
    for name in ("stream", "current_stream", "default_stream"):
        setattr(cuda, name, lambda *_: fake_gpu.FakeStream())  # dynamo wants a different function for each name
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_: None
    internals: Any = torch._C
    internals._cuda_getCurrentRawStream = lambda _: 0
    guards = internals._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = torch.as_strided  # torch's own function turns a fake tensor into a real one
    backends["nvidia"] = Backend(compiler=backends["nvidia"].compiler, driver=_Driver)
    triton.runtime.driver.set_active(_Driver())


def _configure_inductor() -> None:
    import torch._inductor.config as settings
    from torch._inductor.fx_passes import fuse_attention, pad_mm

    settings.compile_threads = 1  # other processes do not have the pretended GPU
    settings.fx_graph_cache = False
    settings.joint_graph_constant_folding = False  # constant folding would compute on the GPU
    for module, name in ((fuse_attention, "_sfdp_init"), (pad_mm, "_pad_mm_init")):
        setattr(module, name, lambda *_: None)  # the codec has none of the patterns that these passes need


def _replace_compiler(gpu: Gpu) -> None:
    """Let inductor record kernels instead of loading and launching them."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    tuner: Any = CachingAutotuner
    tuner.precompile = lambda self, *_, **__: _compile(gpu, self)
    tuner.run = lambda self, *_, **__: gpu.launch(self)
    triton.knobs.cache.manager_class = _Files
    triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx


def _stop_at_ptx(backend: Any = None, stages: Any = None, *_: object) -> tuple[str, str] | None:
    """Triton's hook for the stages of a compilation. Without arguments, it returns the key and hash of the hook."""
    if backend is None:
        return "no machine code", f"but for {DISASSEMBLED}"
    if backend.target.arch not in DISASSEMBLED:
        stages["cubin"] = lambda *_: b""
    return None


def _compile(gpu: Gpu, kernel: Any) -> None:
    """Make the code of a kernel for each architecture, with inductor's options and its first choice of tile sizes."""
    name, choice = kernel.inductor_meta["kernel_name"], kernel.configs[0]
    meta = kernel._create_compile_meta(choice)
    source = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
    for architecture in gpu.architectures:
        key = (kernel.fn.src + str(meta["signature"]), architecture)
        if key not in gpu.codes:
            options = kernel._create_compile_options(choice, meta)
            with torch.utils._python_dispatch._disable_current_modes():
                made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            gpu.codes[key] = code_of(name, architecture, made)


def code_of(name: str, architecture: int, made: Any) -> Code:
    """Read the code of a compiled Triton kernel."""
    ptx = made.asm["ptx"]
    body = ptx[ptx.index("{") :]
    binary = _instructions(made.asm["cubin"]) if architecture in DISASSEMBLED else b""
    return Code(name, architecture, frozenset(_INSTRUCTION.findall(body)), binary)


def _instructions(cubin: bytes) -> bytes:
    """Return the machine code in an ELF file for a GPU, which is its only section of text."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(count)]
    titles = cubin[sections[names][4] :]
    (text,) = (each for each in sections if titles.startswith(b".text.", each[0]))
    return cubin[text[4] : text[4] + text[5]]


def machine_code(codes: Sequence[Code]) -> list[frozenset[str]]:
    """Return the machine instructions of each kernel, with their operands.

    ptxas may make instructions that the PTX does not have, for example a fused multiply-add.
    """
    found: list[set[str]] = [set() for _ in codes]
    by_architecture = defaultdict[int, list[int]](list)
    for index, code in enumerate(codes):
        if code.binary:
            by_architecture[code.architecture].append(index)
    for architecture, indices in by_architecture.items():
        starts = [0, *itertools.accumulate(len(codes[index].binary) for index in indices)]
        for address, instruction in _disassemble(architecture, b"".join(codes[index].binary for index in indices)):
            found[indices[bisect_right(starts, address) - 1]].add(instruction)
    return [frozenset(each) for each in found]


def _disassemble(architecture: int, instructions: bytes) -> list[tuple[int, str]]:
    """Return address and text of each instruction. The tool takes 0.2 s to start, so it gets all kernels at once."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile() as file:
        file.write(instructions)
        file.flush()
        model = sm_arch_from_capability(architecture).replace("sm_", "SM")
        command = [str(tool), "--binary", model, "-c", "-ndf", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _MACHINE_INSTRUCTION.findall(text)
    return [(int(address, 16), f"{name} {operands}".strip()) for address, name, operands in found]
