"""On GPUs, the codec rounds like a CPU, runs few kernels, and needs little memory. The tests need no GPU.

A child process runs the codec on a pretended GPU (see kernels_for_gpus.py). Its tensors are fake and have no values,
so a function that reads from the GPU fails. Compiling for four architectures takes minutes.
"""

import re
from typing import Any

import pytest
from triton_child import NEEDS_COMPILERS, read_report

ARCHITECTURES = (80, 90, 100, 120)
DISASSEMBLED = (80, 120)  # as in kernels_for_gpus, which cannot be imported here
STACK_20B, STACK_120B = 32 * 2880 * 5760, 128 * 2880 * 5760  # values
INEXACT = re.compile(
    r"\.ftz|\.approx|\.full|^(div|rcp|sqrt|rsqrt|ex2|lg2|sin|cos|tanh)\b.*\.(f32|f64)|^fma(?!\.rn\.bf16)"
)
"""PTX instructions whose results could differ from a CPU's results.

They flush subnormals to zero, approximate a result, or divide floats. Fused instructions round once instead of twice.
For sm_80, the PTX adds BF16 values with a fused multiplication by 1. INEXACT does not match this instruction, because
FUSED and SUM check the machine instructions.
"""
FUSED = re.compile(r"^(FFMA|DFMA|HFMA2\S*)|^F(ADD|MUL|SETP?|MNMX)\S*\.FTZ")
"""Machine instructions that fuse or flush in the same way.

INEXACT finds all other inexact instructions, because they are always in the PTX.
"""
MOVE = re.compile(r"^\S+ \w+(\.reuse)?, -?RZ(\.H0_H0)?, RZ(\.H0_H0)?, ")
"""Fused instructions whose product is 0 * 0. ptxas uses them to move or negate values and to load constants."""
SUM = re.compile(r"^HFMA2\S* \w+(\.reuse)?, \w+(\.reuse)?, 1, 1, ")
"""Fused instructions that multiply by 1. ptxas uses them to add BF16 values.

They give the same bits as a CPU. A CPU rounds the sum to 24 bits, and then to 8 bits. A fused instruction rounds it to
8 bits at once. Both results are equal (Figueroa 1995: 24 >= 2 * 8 + 2).
"""

pytestmark = NEEDS_COMPILERS


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child process prints."""
    found: dict[str, Any] = read_report(
        "codec_on_pretended_gpu.py", tmp_path_factory.mktemp("inductor"), *ARCHITECTURES
    )
    return found


def inexact(code: dict[str, Any]) -> set[str]:
    """Search a kernel's code for instructions whose results could differ from the results on a CPU."""
    ptx = {each for each in code["ptx"] if INEXACT.search(each)}
    exact = (MOVE, SUM)
    return ptx | {each for each in code["machine"] if FUSED.search(each) and not any(e.match(each) for e in exact)}


def launches(use: dict[str, Any]) -> int:
    return sum(use["launches"].values())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_no_kernel_approximates_flushes_or_fuses(report: dict[str, Any], architecture: int) -> None:
    codes = [code for code in report["codes"] if code["architecture"] == architecture]
    assert len(codes) > 50
    assert all(code["ptx"] and bool(code["machine"]) is (architecture in DISASSEMBLED) for code in codes)
    assert {code["name"]: inexact(code) for code in codes if inexact(code)} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_a_reciprocal_and_a_fused_product_would_be_found(report: dict[str, Any], architecture: int) -> None:
    """The kernels of `controls` are compiled with inductor's default options, which the codec must not use."""
    reciprocal, product = (code for code in report["controls"] if code["architecture"] == architecture)
    assert "div.full.f32" in inexact(reciprocal)
    assert "fma.rn.f32" in inexact(product)
    assert any(each.startswith("FFMA") for each in inexact(product)) is (architecture in DISASSEMBLED)


def test_every_kernel_of_the_codec_is_among_them(report: dict[str, Any]) -> None:
    assert report["never_compiled"] == ["unpack", "_e8m0_values"], "only CPUs decode slab by slab"


def test_a_stack_takes_few_launches_however_many_experts_it_has(report: dict[str, Any]) -> None:
    """One of the launches sets the flag for NaN and Inf."""
    found = {name: launches(use) for name, use in report["rounding"].items()}
    assert all(found[f"mxfp4 {rule}"] <= 6 for rule in ("ceil", "floor", "mse"))
    assert all(found[f"nvfp4 {rule}"] <= 9 for rule in ("nearest", "ceil", "floor", "mse"))
    assert found["inputs"] <= 7
    assert found["120b"] == found["more than int32"] == found["mxfp4 ceil"]


def test_packed_weights_are_decoded_in_one_launch_and_rounded_in_a_few(report: dict[str, Any]) -> None:
    """Slab by slab, decoding would take 112 launches."""
    found = {name: launches(use) for name, use in report["packed"].items()}
    assert found == {"decode": 1, "base + delta mxfp4 ceil": 7, "base + delta nvfp4 nearest": 9}


def test_base_plus_delta_is_rounded_without_a_copy_of_the_base_or_the_sum(report: dict[str, Any]) -> None:
    found = {name: use["temporary_bytes"] for name, use in report["packed"].items()}
    assert found["decode"] == 0
    assert found["base + delta mxfp4 ceil"] < 0.4 * STACK_20B  # four float32 numbers for each block of 32 weights
    assert found["base + delta nvfp4 nearest"] < 1.1 * STACK_20B  # five for each block of 16


def test_rounding_a_stack_takes_less_than_a_byte_per_value_beside_the_result(report: dict[str, Any]) -> None:
    found = {name: use["temporary_bytes"] for name, use in report["rounding"].items()}
    assert all(size <= STACK_20B for size in found.values())
    assert found["120b"] < STACK_120B / 8


def test_without_a_compiler_slabs_keep_the_memory_small(report: dict[str, Any]) -> None:
    found = {name: use["temporary_bytes"] for name, use in report["eager"].items()}
    assert all(size < 1.5e9 for size in found.values())


def test_a_stack_beyond_the_range_of_int32_gets_wide_indices(report: dict[str, Any]) -> None:
    """Kernels that read or write values must not use 32-bit indices.

    Kernels that only touch scales may use them, because a stack has 32 times fewer scales than values. The largest
    stack of gpt-oss-120b has 2.12e9 values, which is still below 2^31.
    """
    found = report["rounding"]["more than int32"]["index_bits"]
    assert sum(bits == 64 for bits in found.values()) == 2
    assert STACK_120B + (1 << 20) < 2**31
    assert set(report["rounding"]["120b"]["index_bits"].values()) == {32}
