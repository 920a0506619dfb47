"""Each GPU that `doctor` can plan for is recognized by the name that the driver reports."""

import pytest

from pipeline.config.gpus import GPUS, recognize_gpu

NAMES = {
    "l4": "NVIDIA L4",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx5090": "NVIDIA GeForce RTX 5090",
    "rtx6000_ada": "NVIDIA RTX 6000 Ada Generation",
    "l40s": "NVIDIA L40S",
    "a100": "NVIDIA A100-SXM4-80GB",
    "a100_pcie": "NVIDIA A100 80GB PCIe",
    "a100_40gb": "NVIDIA A100-SXM4-40GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h100_pcie": "NVIDIA H100 PCIe",
    "h100_nvl": "NVIDIA H100 NVL",
    "h200": "NVIDIA H200",
    "h200_nvl": "NVIDIA H200 NVL",
    "b200": "NVIDIA B200",
}


def test_each_row_has_an_example() -> None:
    assert list(NAMES) == list(GPUS)


@pytest.mark.parametrize(("key", "name"), NAMES.items())
def test_a_gpu_is_recognized_by_the_name_of_the_driver(key: str, name: str) -> None:
    assert recognize_gpu(name) is GPUS[key]
    assert recognize_gpu(name.removeprefix("NVIDIA ")) is GPUS[key]


@pytest.mark.parametrize(
    "name",
    [
        "Tesla T4",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ],
)
def test_similar_names_are_other_gpus(name: str) -> None:
    assert recognize_gpu(name) is None


@pytest.mark.parametrize(("card", "module"), [("h100_pcie", "h100"), ("h100_nvl", "h100"), ("h200_nvl", "h200")])
def test_cards_compute_more_slowly_than_modules(card: str, module: str) -> None:
    assert GPUS[card].flops < GPUS[module].flops and GPUS[card].fp32_flops < GPUS[module].fp32_flops
