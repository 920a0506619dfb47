"""GPUs that `doctor` can plan for: their memory, and the peak speeds that its estimates of time start from."""

from dataclasses import dataclass
from enum import Enum

from pipeline.config.choices import add_members


@dataclass(frozen=True)
class GpuModel:
    """A model of GPU.

    Attributes:
        words: words that occur together in the name that the driver reports.
        flops: peak dense BF16 arithmetic of the tensor cores with FP32 accumulation, in FLOP/s.
        bytes_per_second: peak bandwidth of the memory, in bytes/s.
        memory_bytes: size of the memory, in bytes.
        source: document that has these figures. Datasheets state FLOP/s with sparsity; `flops` is half of that.
    """

    words: tuple[str, ...]
    flops: float
    bytes_per_second: float
    memory_bytes: int
    source: str


GPUS = {
    "l4": GpuModel(("L4",), 121e12, 300e9, 24 * 10**9, "NVIDIA L4 datasheet"),
    "rtx4090": GpuModel(("RTX", "4090"), 165.2e12, 1008e9, 24 * 10**9, "NVIDIA Ada GPU architecture whitepaper"),
    "l40s": GpuModel(("L40S",), 362e12, 864e9, 48 * 10**9, "NVIDIA L40S datasheet"),
    "a100": GpuModel(("A100", "80GB"), 312e12, 2.039e12, 80 * 10**9, "NVIDIA A100 datasheet, SXM 80 GB"),
    "h100": GpuModel(("H100",), 989e12, 3.35e12, 80 * 10**9, "NVIDIA H100 datasheet, SXM"),
    "h200": GpuModel(("H200",), 989e12, 4.8e12, 141 * 10**9, "NVIDIA H200 datasheet, SXM"),
    "b200": GpuModel(("B200",), 2250e12, 8e12, 180 * 10**9, "NVIDIA HGX B200 datasheet, per GPU"),
}
"""GPUs by their names in `doctor.gpu`. To add a GPU, add a row."""


class GpuName(Enum):
    """Values of `doctor.gpu`: the rows of GPUS."""

    add_members(vars(), GPUS)


def recognize_gpu(name: str) -> GpuModel | None:
    """Return the GPU with this name, such as `NVIDIA H100 80GB HBM3`. Return None if GPUS has no row for it."""
    words = name.replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if all(word in words for word in gpu.words)), None)
