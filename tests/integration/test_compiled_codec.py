"""Compiled kernels give the same bits as eager ones, for every format and scale rule.

Compiling takes minutes, so this is no unit test.
"""

import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
import torch
from tensor_bits import bits
from torch import Tensor
from torch._dynamo.utils import counters

from pipeline.numerics import codec, low_rank, slabs
from pipeline.numerics.codec import decode, encode, fake_quantize, tensor_scale
from pipeline.numerics.compiled import Compilation, can_compile, compilation
from pipeline.numerics.formats import FORMATS, MXFP4, SCALE_RULES, BlockFormat
from pipeline.numerics.packed_rounding import round_packed
from pipeline.numerics.stochastic import Noise, round_to_scales

pytestmark = pytest.mark.skipif(not can_compile("cpu"), reason="no C++ compiler on this machine")

SHAPE = (3, 37, 192)  # experts, out, in. 37 lanes do not fill whole vector registers
ORDERS = {
    "in_last": lambda values: values,
    "in_first": lambda values: values.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.fixture(autouse=True)
def must_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Split the work into several slabs, and fail if a kernel silently falls back to eager."""
    monkeypatch.setitem(slabs.VALUES, "cpu", 37 * 64)
    with torch._dynamo.config.patch(recompile_limit=100, fail_on_recompile_limit_hit=True), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def sample(dtype: torch.dtype) -> Tensor:
    """Make values. Half of them are random. The others are multiples of 1/4, so that many of them are ties.

    Blocks have different magnitudes. Zeros of both signs are included.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(SHAPE, generator=generator)
    values[:, ::2] = (values[:, ::2] * 16).round() / 4
    sizes = torch.randint(-20, 20, (*SHAPE[:2], SHAPE[2] // 16), generator=generator)
    values = values * torch.exp2(sizes.float()).repeat_interleave(16, dim=-1)
    values[..., 5], values[..., 70] = 0.0, -0.0
    return values.to(dtype)


def everything(values: Tensor, block_format: BlockFormat, importance: Tensor) -> list[Tensor]:
    """Compute all results of the codec for some values."""
    unit = tensor_scale(values, block_format)
    blocks, scales = encode(values, block_format, unit)
    decoded = [decode(blocks, scales, values.dtype, unit, out=into) for into in (None, torch.empty_like(values))]
    rounded = [fake_quantize(values, block_format, unit, weights) for weights in (None, importance)]
    return [blocks, scales, *encode(values, block_format, unit, importance), *decoded, *rounded]


def test_compiled_stochastic_rounding_gives_the_bits_of_eager_code() -> None:
    values = sample(torch.bfloat16)
    scales = encode(values, MXFP4)[1]
    expected, found = [], []
    for mode, results in ((Compilation.never, expected), (Compilation.always, found)):
        with compilation(mode):
            made = round_to_scales(values, MXFP4, scales, noise=Noise.of(42, "stack"))
        results += [bits(made.values), made.blocks, torch.tensor(made.clipped)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("dtype", "order"), [(torch.bfloat16, "in_first"), (torch.float32, "in_last")], ids=str)
def test_compiled_codecs_give_the_bits_of_eager_ones(dtype: torch.dtype, order: str) -> None:
    """Test every format and scale rule, with and without importance."""
    values = ORDERS[order](sample(dtype))
    importance = torch.rand(SHAPE[0], SHAPE[2], generator=torch.Generator().manual_seed(1)) ** 4
    graphs_before = counters["stats"]["unique_graphs"]
    for row in FORMATS.values():
        for block_format in map(row.with_rule, SCALE_RULES[row.scale_type]):
            with compilation(Compilation.never):
                eager = everything(values, block_format, importance)
            with compilation(Compilation.always):
                found = everything(values, block_format, importance)
            for one, other in zip(found, eager, strict=True):
                assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
                assert torch.equal(bits(one), bits(other)), block_format
    assert counters["stats"]["unique_graphs"] > graphs_before
    assert not counters["graph_break"]


def test_the_function_that_rounds_a_stack_on_a_gpu_gives_these_bits_when_a_cpu_compiles_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Test every format and scale rule. The weights are float32, and the rounded weights are bfloat16."""
    monkeypatch.setattr(slabs, "ONLY_SLABS", frozenset())
    values = ORDERS["in_first"](sample(torch.float32))
    importance = torch.rand(SHAPE[0], SHAPE[2], generator=torch.Generator().manual_seed(1)) ** 4
    for row in FORMATS.values():
        for block_format in map(row.with_rule, SCALE_RULES[row.scale_type]):
            with compilation(Compilation.never):
                eager = fake_quantize(values, block_format, None, importance).bfloat16()
            with compilation(Compilation.always):
                found = fake_quantize(values, block_format, None, importance, dtype=torch.bfloat16)
            assert (found.dtype, found.stride()) == (eager.dtype, eager.stride())
            assert torch.equal(bits(found), bits(eager)), block_format
    assert not counters["graph_break"]


def test_the_functions_for_packed_stacks_on_a_gpu_give_these_bits_when_a_cpu_compiles_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slabs, "ONLY_SLABS", frozenset())
    generator = torch.Generator().manual_seed(0)
    count, inputs, lanes = 3, 96, 40
    blocks = torch.randint(0, 256, (count, lanes, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(107, 131, blocks.shape[:3], dtype=torch.uint8, generator=generator)
    scales[0, 0, 0] = 0
    a, b = (0.01 * torch.randn(count, *shape, generator=generator) for shape in ((inputs, 4), (4, lanes)))
    for row in FORMATS.values():
        for block_format in map(row.with_rule, SCALE_RULES[row.scale_type]):
            found = {}
            for mode in (Compilation.never, Compilation.always):
                with compilation(mode):
                    decoded = decode(blocks, scales)
                    rounded = round_packed((blocks, scales), (a, b, 1.5), block_format, dtype=torch.bfloat16)
                    found[mode] = [bits(decoded), bits(rounded)]
            for one, other in zip(*found.values(), strict=True):
                assert torch.equal(one, other), block_format
    assert not counters["graph_break"]


@pytest.mark.parametrize("rank", [8, 24])
def test_compiled_deltas_of_adapters_have_these_bits(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(3, 64, 96, generator=generator).bfloat16()
    a = torch.randn(3, rank, 64, generator=generator).transpose(1, 2)  # with the strides of PEFT's matrices
    b = torch.randn(96, rank, 3, generator=generator).permute(2, 1, 0)
    found = {}
    for mode in (Compilation.never, Compilation.always):
        with compilation(mode):
            found[mode] = [bits(function(base, a, b, 1.7)) for function in (low_rank.merge, low_rank.delta)]
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))


CONVERTS_TWICE = """
import os, warnings, torch
import torch._inductor.config as settings
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.compiled import Compilation, compilation
from pipeline.numerics.formats import MXFP4

settings.cpp.cxx = (None, os.environ.get("CXX", "g++"))  # as torch does when a new interpreter imports the settings
values = torch.linspace(-7, 7, 64)
eager = fake_quantize(values, MXFP4)
with compilation(Compilation.always), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(fake_quantize(values, MXFP4).view(torch.int32), eager.view(torch.int32))
print([str(warning.message) for warning in caught if "torch.compile failed" in str(warning.message)])
"""


@pytest.mark.parametrize("broken", ["compiles_nothing", "is_no_compiler", "has_no_cache"])
def test_a_broken_compiler_costs_a_warning_and_no_result(tmp_path: Path, broken: str) -> None:
    """The codec runs in a fork, because torch remembers which compiler it has found."""
    cache, compiler, script = (tmp_path / name for name in ("cache", "c++", "script.py"))
    script.write_text(CONVERTS_TWICE)
    version = 'case "$1" in --version) echo "g++ 13.0.0"; exit 0;; esac\n' if broken == "compiles_nothing" else ""
    compiler.write_text(f"#!/bin/sh\n{version}exit 1\n")
    compiler.chmod(0o755)
    if broken == "has_no_cache":
        cache.write_text("a file, where torch wants a folder")
    environment = {
        **os.environ,
        **({} if broken == "has_no_cache" else {"CXX": str(compiler)}),
        "PYTHONPATH": str(Path(codec.__file__).parents[2]),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),  # otherwise cached machine code of an earlier run would be used
    }
    command = [*forks.interpreter(), str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("torch.compile failed, conversions continue uncompiled") == 1
