"""Run the codec's Triton kernels with the interpreter, and print a JSON object about them (see `main`)."""

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from interpreted_gpu import Edit, InterpretedGpu

gpu = InterpretedGpu()  # before other imports: they import inductor, which keeps the functions of CUDA that it finds

from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from pipeline.numerics.codec import decode, encode, fake_quantize, tensor_scale  # noqa: E402
from pipeline.numerics.compiled import Compilation, compilation  # noqa: E402
from pipeline.numerics.formats import MXFP4, NVFP4, BlockFormat  # noqa: E402
from pipeline.numerics.packed_rounding import round_packed  # noqa: E402
from pipeline.numerics.stochastic import Noise, round_to_scales  # noqa: E402

COUNT, LANES, BLOCKS = 2, 65, 2  # experts, out, MXFP4 blocks per row. 65 lanes fill no whole tile, so masks matter
WIDTH, RANK = 32 * BLOCKS, 3
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
generator = torch.Generator().manual_seed(0)

Use = Callable[[], Tensor | tuple[Tensor, Tensor]]


def packed(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return a stack of random codes. `scales` are bytes, and are repeated to fill the stack."""
    blocks = torch.randint(0, 256, (COUNT, LANES, BLOCKS, 16), dtype=torch.uint8, generator=generator)
    return blocks, scales.repeat(2)[: COUNT * LANES * BLOCKS].view(blocks.shape[:3])


def weights() -> Tensor:
    """Return weights (experts, out, in) of all magnitudes, with lanes contiguous.

    Half of them are multiples of 1/4 before they are scaled, so many are ties. One block is zero. Some blocks have
    subnormals or values near the largest float.
    """
    values = torch.randn(COUNT, BLOCKS, 32, LANES, generator=generator)
    values[..., ::2] = (values[..., ::2] * 16).round() / 4
    powers = torch.randint(-140, 121, (COUNT, BLOCKS, 1, LANES), generator=generator)
    powers[..., ::2] = torch.randint(-12, 12, powers[..., ::2].shape, generator=generator)
    values *= torch.exp2(powers.double()).float()
    values[0, 0, :, 3], values[0, 0, 5], values[1, 1, 7], values[1, 0, 0, 1] = 0.0, 0.0, -0.0, -3e38
    return values.view(COUNT, WIDTH, LANES).transpose(1, 2)


def uses() -> Iterator[tuple[str, Use]]:
    """Yield uses of the codec in training and in exports. Compiling takes most of their time, so they are few."""
    every_scale = torch.arange(256, dtype=torch.uint8)
    stack, values = packed(every_scale), weights()
    for dtype in (torch.bfloat16, torch.float32):
        yield f"decode to {str(dtype).removeprefix('torch.')}", partial(decode, *stack, dtype)
    for row in (MXFP4, NVFP4, NVFP4.with_rule("mse")):
        yield f"round to {row.name} {row.scale_rule}", partial(fake_quantize, values, row, dtype=torch.bfloat16)
    base = packed(torch.arange(107, 131, dtype=torch.uint8).repeat(8))
    a, b = (0.1 * torch.randn(COUNT, *shape, generator=generator) for shape in ((WIDTH, RANK), (RANK, LANES)))
    yield "round base + delta to mxfp4 ceil", partial(round_packed, base, (a, b, 1.5), MXFP4, dtype=torch.bfloat16)
    yield "encode to mxfp4 ceil", partial(encode, values, MXFP4)
    for row in (MXFP4, NVFP4):
        unit = tensor_scale(values, row)
        stored = encode(values, row, unit)[1]
        yield f"round stochastically to {row.name}", partial(round_at_random, values, row, stored, unit)


def round_at_random(
    values: Tensor, block_format: BlockFormat, stored: Tensor, unit: Tensor | None
) -> tuple[Tensor, Tensor]:
    found = round_to_scales(values, block_format, stored, unit, noise=Noise.of(42, "stack"), first=5)
    return found.blocks, found.values


def compare(use: Use) -> dict[str, object]:
    """Compute a use eagerly on the CPU, and with interpreted kernels. Count the values with different bits."""
    gpu.launches.clear()
    with compilation(Compilation.never):
        expected = use()
    assert not gpu.launches
    started = time.process_time()
    with compilation(Compilation.always):
        found = use()
    unequal = sum(map(count_unequal, tree_leaves(found), tree_leaves(expected)))
    return {"launches": len(gpu.launches), "unequal": unequal, "seconds": time.process_time() - started}


def count_unequal(one: Tensor, other: Tensor) -> int:
    """Count the values with different bits. All NaNs are equal."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    pair = [each.contiguous().view(BITS[each.element_size()]) for each in (one, other)]
    differs = pair[0] != pair[1]
    return int((differs & ~(one.isnan() & other.isnan())).sum() if one.is_floating_point() else differs.sum())


def compare_edited(use: Use, edit: Edit) -> dict[str, object]:
    """Compile all kernels again, change their source, and compare. Also count the kernels that changed."""
    changed = []

    def change(source: str) -> str:
        changed.append(edit(source) != source)
        return edit(source)

    gpu.edit = change
    torch._dynamo.reset()
    return {**compare(use), "changed": sum(changed)}


def replacing(pattern: str, new: str) -> Edit:
    return lambda source: re.sub(pattern, new, source)


MUTATIONS = {
    "a shift by 22 instead of 23": ("decode to bfloat16", replacing(r"\b23, tl.int32", "22, tl.int32")),
    "one lane too few": ("decode to bfloat16", replacing(rf"xnumel = {LANES}\b", f"xnumel = {LANES - 1}")),
    "-x as 0 - x": ("decode to bfloat16", replacing(r"(tmp\d+) \* tmp\d+(\n.*tl\.where)", r"0.0 - \1\2")),
    "ties go up": ("round to mxfp4 ceil", replacing(r"(tmp\d+) > (tmp\d+)", r"\1 >= \2")),
}
"""What is wrong -> the use that finds it, and the change of the kernels' source."""


def main() -> None:
    """Print an object with these keys.

    uses: use of the codec -> number of launches, number of values with different bits, seconds of CPU time.
    mutations: the same for wrong kernels, and the number of kernels that were changed.
    """
    every = dict(uses())
    found = {name: compare(use) for name, use in every.items()}
    mutations = {name: compare_edited(every[use], edit) for name, (use, edit) in MUTATIONS.items()}
    print(json.dumps({"uses": found, "mutations": mutations}))


main()
