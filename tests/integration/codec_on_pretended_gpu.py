"""Run the codec on a pretended GPU, and print a JSON object about it (see `main`).

    python tests/integration/codec_on_pretended_gpu.py 80 90

The arguments are architectures for which Triton makes code.
"""

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from kernels_for_gpus import Code, Gpu, machine_code, pretend

gpu = Gpu(tuple(map(int, sys.argv[1:])))
pretend(gpu)  # before other imports: they import inductor, which keeps the functions of CUDA that it finds

from torch import Tensor  # noqa: E402

from pipeline.numerics import codec, comparison, kernels, low_rank, scales, stacks  # noqa: E402
from pipeline.numerics.codec import decode, encode, fake_quantize, tensor_scale  # noqa: E402
from pipeline.numerics.compiled import Compilation, Kernel, compilation  # noqa: E402
from pipeline.numerics.formats import MXFP4, NVFP4, SCALE_RULES, BlockFormat  # noqa: E402
from pipeline.numerics.packed_rounding import round_packed  # noqa: E402

GATE_UP_20B = (32, 2880, 5760)
GATE_UP_120B = (128, 2880, 5760)
TOO_LARGE_FOR_INT32 = (130, 2880, 5760)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def weights(shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a view (experts, out, in) of a parameter (experts, in, out)."""
    return empty(*shape, dtype=dtype).transpose(1, 2)


def rounding_uses() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the uses of fake quantization in training. None of them may read from the GPU."""
    is_bad = empty(dtype=torch.bool)

    def use(values: Tensor, block_format: BlockFormat, unit: Tensor | None = None, importance: Tensor | None = None):  # type: ignore[no-untyped-def]
        return lambda: fake_quantize(values, block_format, unit, importance, dtype=torch.bfloat16, is_bad=is_bad)

    for row in (MXFP4, NVFP4):
        for rule in SCALE_RULES[row.scale_type]:
            yield f"{row.name} {rule}", use(weights(GATE_UP_20B), row.with_rule(rule))
    importance = empty(2880, dtype=torch.float32)
    yield "mxfp4 mse, importance", use(weights(GATE_UP_20B), MXFP4.with_rule("mse"), None, importance)
    yield "mxfp4 from float32", use(weights(GATE_UP_20B, torch.float32), MXFP4)
    yield "inputs", use(empty(4096, 2880), NVFP4, empty(dtype=torch.float32))


def packed_uses() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the uses of packed weights in training. None of them may read from the GPU."""
    count, width, out = GATE_UP_20B
    packed = empty(count, out, width // 32, 16, dtype=torch.uint8), empty(count, out, width // 32, dtype=torch.uint8)
    rank = 8
    factors = empty(count, width, rank, dtype=torch.float32), empty(count, rank, out, dtype=torch.float32), 2.0
    is_bad, into = empty(dtype=torch.bool), weights(GATE_UP_20B)
    yield "decode", lambda: decode(*packed, out=into) is None
    for row in (MXFP4, NVFP4):
        use = functools.partial(round_packed, packed, factors, row, dtype=torch.bfloat16, is_bad=is_bad)
        yield f"base + delta {row.name} {row.scale_rule}", use


def large_uses() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield roundings of larger stacks. They differ from `rounding_uses` only in size, so no code is made for them."""
    is_bad = empty(dtype=torch.bool)

    def use(values: Tensor) -> Callable[[], object]:
        return lambda: fake_quantize(values, MXFP4, is_bad=is_bad)

    yield "120b", use(weights(GATE_UP_120B))
    yield "more than int32", use(weights(TOO_LARGE_FOR_INT32))


def other_uses() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the uses of the codec in exports and reports."""
    values, importance = weights((2, 2880, 2880)), empty(2880, dtype=torch.float32)
    saturated = empty(2, 2880, 180, dtype=torch.bool)

    def use(block_format: BlockFormat) -> Callable[[], object]:
        def run() -> None:
            unit, marks = tensor_scale(values, block_format), saturated[..., : 2880 // block_format.block_size]
            blocks, stored = encode(
                values, block_format, unit, None, rounded=values.clone(), saturated=marks.contiguous()
            )
            if block_format.scale_rule == "mse":
                encode(values.float(), block_format, unit, importance)
            decode(blocks, stored, torch.bfloat16, unit)

        return run

    for row in (MXFP4, NVFP4):
        for rule in SCALE_RULES[row.scale_type]:
            yield f"encode {row.name} {rule}", use(row.with_rule(rule))
    stack = empty(2, 2880, 2880)
    yield "differences", lambda: comparison.differences([stack] * 4)
    yield "unequal_blocks", lambda: comparison.unequal_blocks(stack, stack, MXFP4)
    yield "column_products", lambda: kernels.column_products(stack, stack)
    yield "changes", lambda: comparison.changes([stack] * 4)
    scale = empty(2, 2880, 90, dtype=torch.float32)
    yield "count_clipped", lambda: comparison.count_clipped(stack, scale, MXFP4)
    yield "row_squares", lambda: kernels.row_squares(stack)
    a, b = empty(2, 2880, 8, dtype=torch.float32), empty(2, 8, 2880, dtype=torch.float32)
    yield "delta", lambda: low_rank.delta(stack, a, b, 2.0)
    yield "merge", lambda: low_rank.merge(stack, a, b, 2.0)


def control() -> None:
    """Compile operations that the codec must avoid, with inductor's default options."""
    torch.compile(lambda values: values.reciprocal(), dynamic=False)(empty(4096, dtype=torch.float32))
    torch.compile(lambda values: values * values + values, dynamic=False)(empty(4096, dtype=torch.float32))


def measure(run: Callable[[], object]) -> dict[str, object]:
    gpu.start()
    before = gpu.live
    made = run()
    result = made.nbytes if isinstance(made, Tensor) else 0
    return {
        "launches": dict(gpu.launches),
        "index_bits": dict(gpu.index_bits),
        "temporary_bytes": gpu.peak - before - result,
    }


def describe(codes: Mapping[object, Code]) -> list[dict[str, object]]:
    """Return name, architecture, PTX instructions and machine instructions of each kernel."""
    every = list(codes.values())
    return [
        {"name": code.name, "architecture": code.architecture, "ptx": code.ptx, "machine": machine}
        for code, machine in zip(every, machine_code(every), strict=True)
    ]


def main() -> None:
    """Print an object with these keys.

    controls: code of kernels that break the rules, described in the same way.
    codes: code of the codec's kernels (see `describe`).
    rounding: use in training -> its launches, index widths and bytes of temporary tensors. Kernels are compiled.
    packed: the same figures for packed weights.
    eager: the same figures without compilation.
    never_compiled: names of the kernels that were not compiled.
    """
    warnings.filterwarnings("error", message="torch.compile failed")
    control()
    controls, gpu.codes = gpu.codes, {}
    # Exports run these checks, which read from the GPU. That is impossible here, because fake tensors have no values.
    codec._raise_if_any = codec._raise_if_not_importance = lambda *_: None  # type: ignore[assignment]
    every = {
        each.__name__: each
        for module in (kernels, low_rank, scales, stacks)
        for each in vars(module).values()
        if isinstance(each, Kernel)
    }
    with compilation(Compilation.always):
        found = {name: measure(run) for name, run in rounding_uses()}
        packed = {name: measure(run) for name, run in packed_uses()}
        for _, run in other_uses():
            run()
        gpu.architectures = ()
        found |= {name: measure(run) for name, run in large_uses()}
    with compilation(Compilation.never):
        eager = {name: measure(run) for name, run in rounding_uses()}
    report = {
        "controls": describe(controls),
        "codes": describe(gpu.codes),
        "rounding": found,
        "packed": packed,
        "eager": eager,
        "never_compiled": [name for name, each in every.items() if not each._compiled],
    }
    print(json.dumps(report, default=sorted))


main()
