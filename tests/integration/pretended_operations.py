"""Try single operations on a pretended GPU.

Print a JSON object: operation -> [error or null, the kinds of its host syncs].
"""

import json
from collections import Counter
from collections.abc import Callable

import pretended_gpu
import torch

OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    # CUDA refuses these. `gpu` and `cpu` have the values 0, 1, 2.
    "add": lambda gpu, cpu: gpu + cpu,
    "add to a number": lambda gpu, cpu: torch.zeros(()).add_(gpu.sum()),
    "add a number to a vector": lambda gpu, cpu: cpu + gpu.sum(),
    "compare": lambda gpu, cpu: gpu != cpu,
    "cat": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "stack numbers": lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
    "matmul": lambda gpu, cpu: gpu @ cpu,
    "where": lambda gpu, cpu: torch.where(gpu > 1, gpu, cpu),
    "embedding": lambda gpu, cpu: torch.nn.functional.embedding(cpu.long(), gpu[:, None]),
    "index of the GPU": lambda gpu, cpu: cpu[gpu.long()],
    "values of the CPU": lambda gpu, cpu: gpu.index_put_((gpu.long(),), cpu),
    "numpy": lambda gpu, cpu: gpu.numpy(),
    "generator": lambda gpu, cpu: torch.rand(2, device="cuda", generator=torch.Generator()),
    "pin": lambda gpu, cpu: gpu.pin_memory(),
    # CUDA computes these, without waiting.
    "add a number": lambda gpu, cpu: gpu + cpu.sum(),
    "factory": lambda gpu, cpu: gpu + torch.ones(3, device="cuda"),
    "fill a mask": lambda gpu, cpu: gpu.masked_fill_(gpu > 1, 0),
    "assign a number": lambda gpu, cpu: gpu.__setitem__(gpu > 1, 0),
    "copy later": lambda gpu, cpu: gpu.to("cpu", non_blocking=True),
    "copy from the CPU later": lambda gpu, cpu: cpu.to("cuda", non_blocking=True),
    "backward": lambda gpu, cpu: gpu.requires_grad_().square().sum().backward(),
    # The host waits for the GPU.
    "item": lambda gpu, cpu: gpu.sum().item(),
    "bool": lambda gpu, cpu: bool(gpu.sum() > 1),
    "tolist": lambda gpu, cpu: gpu.tolist(),
    "cpu": lambda gpu, cpu: gpu.cpu(),
    "copy to the CPU": lambda gpu, cpu: cpu.copy_(gpu),
    "copy from the CPU": lambda gpu, cpu: cpu.to("cuda"),
    "index of the CPU": lambda gpu, cpu: gpu[cpu.long()],
    "nonzero": lambda gpu, cpu: gpu.nonzero(),
    "equal": lambda gpu, cpu: torch.equal(gpu, gpu.clone()),
    "mask": lambda gpu, cpu: gpu[gpu > 1],
    "assign to a mask": lambda gpu, cpu: gpu.__setitem__(gpu > 0, torch.ones(2, device="cuda")),
    "backward of a mask": lambda gpu, cpu: gpu.requires_grad_()[gpu > 0].sum().backward(),
}


def attempt(operation: Callable[[torch.Tensor, torch.Tensor], object]) -> tuple[str | None, list[str]]:
    gpu, cpu = torch.arange(3.0, device="cuda"), torch.arange(3.0)
    before = Counter(pretended_gpu.SYNCS)
    try:
        operation(gpu, cpu)
        error = None
    except (RuntimeError, TypeError) as found:
        error = str(found)
    return error, sorted(sync.what for sync in (pretended_gpu.SYNCS - before).elements())


if __name__ == "__main__":
    print(json.dumps({name: attempt(operation) for name, operation in OPERATIONS.items()}))
