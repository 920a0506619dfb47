"""GPUs that `doctor` can plan for: their memory, and the peak speeds that its estimates of time start from."""

from dataclasses import dataclass
from enum import Enum

from pipeline.config.choices import add_members


@dataclass(frozen=True)
class GpuModel:
    """A model of GPU.

    Attributes:
        names: names that the driver reports, as in `torch.cuda.get_device_name`, without the leading NVIDIA.
        capability: compute capability, from NVIDIA's list of CUDA GPUs.
        flops: peak dense BF16 arithmetic of the tensor cores with FP32 accumulation, in FLOP/s.
        fp32_flops: peak FP32 arithmetic without tensor cores (not TF32), in FLOP/s.
        bytes_per_second: peak bandwidth of the memory, in bytes/s.
        memory_bytes: size of the memory, in bytes.
        source: document that has these figures. Datasheets state FLOP/s with sparsity; `flops` is half of that.
    """

    names: tuple[str, ...]
    capability: tuple[int, int]
    flops: float
    fp32_flops: float
    bytes_per_second: float
    memory_bytes: int
    source: str


_ADA, _AMPERE, _HOPPER = (8, 9), (8, 0), (9, 0)
_A100, _H100, _H200 = "NVIDIA A100 datasheet", "NVIDIA H100 datasheet", "NVIDIA H200 datasheet"
_ADA_PAPER, _BLACKWELL_PAPER = "NVIDIA Ada GPU architecture whitepaper", "NVIDIA RTX Blackwell architecture whitepaper"
_GB = 10**9

# Pages with copies of NVIDIA's tables, with which the figures were compared. Dense figures count, not sparse ones.
# - A100 (all): glennklockwood.com/garden/processors/A100, which cites the datasheet, and
#   thundercompute.com/blog/nvidia-a100-specs-full-guide (1555, 1935 and 2039 GB/s).
# - H100 SXM and PCIe: archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (1979 and 1513 TFLOPS with sparsity).
# - H200 SXM: lzwjava.github.io/nvidia-h200-gpu-specs-en, itkb.uw.cz/2026/06/nvidia-h200-vs-b300-precisions-cores.html.
# - B200: glennklockwood.com/garden/processors/B200 (2250 TFLOPS), hmc-tech.com/gpus/nvidia-b200-vs-nvidia-b100
#   (75 TFLOPS in FP32, 7.7 TB/s), github.com/pytorch/ao/pull/4002 (7.67 TB/s from the bus and the clock of a GPU).
#   Early pages say 8 TB/s, and 80 TFLOPS in FP32.
# - L40S: mullet.se, product 355414 (362.05 dense). L4: grokipedia.com/page/NVIDIA_L4_vs_L40S (242 with sparsity).
# - RTX 4090: hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-5000-blackwell (165.2, accumulated in FP32).
# - RTX 6000 Ada, FP32: huggingface.co/datasets/ohdoking/gpu_spec. RTX 5090, memory: libertify.com (1792 GB/s).
# In no such copy: BF16 and FP32 of H100 NVL, H200 NVL and RTX 5090; BF16 and bandwidth of RTX 6000 Ada; FP32 of L4.
GPUS = {
    "l4": GpuModel(("L4",), _ADA, 121e12, 30.3e12, 300e9, 24 * _GB, "NVIDIA L4 datasheet"),
    "rtx4090": GpuModel(("GeForce RTX 4090",), _ADA, 165.2e12, 82.6e12, 1008e9, 24 * _GB, _ADA_PAPER),
    "rtx5090": GpuModel(("GeForce RTX 5090",), (12, 0), 209.5e12, 104.8e12, 1792e9, 32 * _GB, _BLACKWELL_PAPER),
    "rtx6000_ada": GpuModel(
        ("RTX 6000 Ada Generation",), _ADA, 364.2e12, 91.1e12, 960e9, 48 * _GB, "NVIDIA RTX 6000 Ada datasheet"
    ),
    "l40s": GpuModel(("L40S",), _ADA, 362e12, 91.6e12, 864e9, 48 * _GB, "NVIDIA L40S datasheet"),
    "a100": GpuModel(
        ("A100-SXM4-80GB", "A100-SXM-80GB"), _AMPERE, 312e12, 19.5e12, 2.039e12, 80 * _GB, f"{_A100}, 80GB SXM"
    ),
    "a100_pcie": GpuModel(("A100 80GB PCIe",), _AMPERE, 312e12, 19.5e12, 1.935e12, 80 * _GB, f"{_A100}, 80GB PCIe"),
    "a100_40gb": GpuModel(
        ("A100-SXM4-40GB", "A100-PCIE-40GB"), _AMPERE, 312e12, 19.5e12, 1.555e12, 40 * _GB, f"{_A100} of 2020, 40GB"
    ),
    "h100": GpuModel(("H100 80GB HBM3",), _HOPPER, 989e12, 67e12, 3.35e12, 80 * _GB, f"{_H100}, SXM"),
    "h100_pcie": GpuModel(("H100 PCIe",), _HOPPER, 756e12, 51e12, 2e12, 80 * _GB, f"{_H100} of 2022, PCIe"),
    "h100_nvl": GpuModel(("H100 NVL",), _HOPPER, 835e12, 60e12, 3.9e12, 94 * _GB, f"{_H100}, NVL"),
    "h200": GpuModel(("H200",), _HOPPER, 989e12, 67e12, 4.8e12, 141 * _GB, f"{_H200}, SXM"),
    "h200_nvl": GpuModel(("H200 NVL",), _HOPPER, 835e12, 60e12, 4.8e12, 141 * _GB, f"{_H200}, NVL"),
    "b200": GpuModel(("B200",), (10, 0), 2250e12, 75e12, 7.7e12, 180 * _GB, "NVIDIA HGX B200 datasheet, per GPU"),
}
"""GPUs by their names in `doctor.gpu`. To add a GPU, add a row."""


class GpuName(Enum):
    """Values of `doctor.gpu`: the rows of GPUS."""

    add_members(vars(), GPUS)


def recognize_gpu(name: str) -> GpuModel | None:
    """Return the GPU with this name, such as `NVIDIA H100 80GB HBM3`. Return None if GPUS has no row for it.

    Names are compared as a whole. So a slice of a GPU (`… MIG 1g.10gb`), a laptop's GPU and other variants are unknown.
    """
    return next((gpu for gpu in GPUS.values() if name.removeprefix("NVIDIA ") in gpu.names), None)
