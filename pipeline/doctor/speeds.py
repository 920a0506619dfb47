"""The speed of a device, and the seconds that it needs for counted work.

    seconds = FLOPs / (efficiency × peak FLOP/s) + bytes / (efficiency × peak bytes/s) + disk bytes / (disk bytes/s)

BF16 and FP32 products have peaks of their own. The efficiencies are assumptions, and the report names them. The terms
are added, because products and memory traffic are different kernels. Start-up, kernel launches and communication
between GPUs are not counted, so a tiny model takes longer than its estimate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from pipeline.config.gpus import GpuModel
from pipeline.doctor.work import Work
from pipeline.models.attention import Capability

COMPUTE_EFFICIENCY = 0.3
"""Assumed share of the peak FLOP/s. Nobody has measured it for this program on a GPU."""
BANDWIDTH_EFFICIENCY = 0.5
"""Assumed share of the peak memory bandwidth."""
DISK_BYTES_PER_SECOND = 1e9
"""Assumed speed of the disk."""
_MATRIX, _COPIED = 1024, 1 << 26  # sizes of the measurement on the CPU


@dataclass(frozen=True)
class Speed:
    """Speed of a device.

    Attributes:
        flops, fp32_flops: FLOP/s of products in BF16 and in FP32.
        bytes_per_second: bytes/s of its memory.
        name: the device, in words.
        capability: compute capability of the GPU, or None for a CPU.
    """

    flops: float
    fp32_flops: float
    bytes_per_second: float
    name: str
    capability: Capability | None = None

    @classmethod
    def of_gpu(cls, gpu: GpuModel, name: str) -> "Speed":
        """Return the speed that is assumed for a GPU: its peaks times the efficiencies."""
        flops, fp32_flops = COMPUTE_EFFICIENCY * gpu.flops, COMPUTE_EFFICIENCY * gpu.fp32_flops
        return cls(flops, fp32_flops, BANDWIDTH_EFFICIENCY * gpu.bytes_per_second, name, gpu.capability)

    @classmethod
    def of_cpu(cls) -> "Speed":
        """Measure this CPU: products of two matrices in BF16 and FP32, and a copy of 64 MiB. This takes a second."""
        import torch

        copied = torch.ones(_COPIED // 4)
        matrices = [torch.ones(_MATRIX, _MATRIX, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
        bf16, fp32 = (2 * _MATRIX**3 / _fastest(partial(torch.matmul, each, each)) for each in matrices)
        return cls(bf16, fp32, 2 * _COPIED / _fastest(copied.clone), "this machine's CPU")

    def seconds(self, done: Work) -> float:
        """Return the seconds that the work takes on one device."""
        arithmetic = done.flops / self.flops + done.fp32_flops / self.fp32_flops
        return arithmetic + done.memory_bytes / self.bytes_per_second + done.disk_bytes / DISK_BYTES_PER_SECOND


def _fastest(run: Callable[[], object]) -> float:
    """Return the shortest time of a few calls, in seconds."""
    times = []
    for _ in range(4):
        before = perf_counter()
        run()
        times.append(perf_counter() - before)
    return min(times)
