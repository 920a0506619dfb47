"""A model that is spread over two fake GPUs runs, and no operation mixes their tensors.

Fake tensors have no values, so this does not test results.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import TinyConfig
from pipeline.models import tiny_model

SPREAD_ON_FAKE_GPUS = """
import sys
from pathlib import Path
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from pipeline.doctor import fake_gpu
from pipeline.models import chunked_logits, loading, losses, placement

fake_gpu.install()
model = loading.load_plain(Path(sys.argv[1]), torch.bfloat16).eval().requires_grad_(False)
sizes = [sum(each.nbytes for each in layer.parameters()) for layer in model.model.layers]
outside = sum(each.nbytes for each in model.parameters()) - sum(sizes)
free = {0: 1.31 * (outside + sizes[0]), 1: 1.31 * sum(sizes[1:])}
make = torch.tensor

def make_fake(values, **arguments):  # torch.tensor copies values to the GPU, which fake mode cannot
    if isinstance(values, (int, float)):
        return torch.full((), values, **arguments)
    return torch.empty(0, **arguments) if values == [] else make(values, **arguments)

def move(layout):  # accelerate finds the tensors on their GPUs, because it cannot move fake parameters
    for name, gpu in layout.items():
        for module in model.get_submodule(name).modules():
            for tensors, wrap in ((module._parameters, torch.nn.Parameter), (module._buffers, lambda made, _: made)):
                for key, old in tensors.items():
                    if old is not None:
                        made = torch.empty(old.shape, dtype=old.dtype, device=f"cuda:{gpu}")
                        tensors[key] = wrap(made, False)

choose = placement.spread_layers
def choose_and_move(model, budgets):
    layout = choose(model, budgets)
    move(layout)
    return layout

with fake_gpu.pretend_cuda(2), FakeTensorMode(allow_non_fake_inputs=True):
    torch.tensor, placement.spread_layers = make_fake, choose_and_move
    torch.cuda.mem_get_info = lambda gpu=0: (int(free[gpu]), int(free[gpu]))
    model = placement.place(model, spread=True)
    print(*sorted({str(parameter.device) for parameter in model.parameters()}), model.device)
    ids = torch.ones(2, 16, dtype=torch.long, device="cuda:0")
    chosen = torch.ones(2, 16, dtype=torch.bool, device="cuda:0")
    answer = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    print(answer.logits.device, *[layer.keys.device for layer in answer.past_key_values.layers])
    hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    print(hidden.device, model.get_output_embeddings().weight.device)
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tiny_model.create_tiny(tmp_path / "tiny", TinyConfig())
    return tmp_path / "tiny"


def test_a_spread_model_runs_with_each_tensor_on_one_gpu(tiny: Path) -> None:
    command = [sys.executable, "-c", SPREAD_ON_FAKE_GPUS, str(tiny)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said, weights, with_cache, states = done.stdout.splitlines()
    assert said == "[loading] the model is spread over 2 GPUs, because it does not fit on one"
    assert weights == "cuda:0 cuda:1 cuda:0"
    assert with_cache == "cuda:0 cuda:0 cuda:1"
    assert states == "cuda:0 cuda:0"
