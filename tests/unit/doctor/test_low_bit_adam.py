"""The states of torchao's optimizers have the computed sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Trainer, TrainingArguments

from pipeline.config.training import ROUNDING_OPTIMIZERS
from pipeline.doctor import low_bit_adam

CODED = [(16, 256), (8, 2880), (2880, 8), (3, 64, 128), (4096,)]
PLAIN = [(8,), (2880,), (15, 256), (4097,), (8, 2881)]
"""Shapes of tensors whose states have no codes: too few values, or an incomplete block."""


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor. torchao's states consist of several tensors."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.nbytes
    return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@pytest.fixture
def make(tmp_path: Any) -> Any:
    """A function that makes an optimizer as transformers makes it."""

    def made(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
        of_type, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer: torch.optim.Optimizer = of_type(parameters, **settings)
        return optimizer

    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", low_bit_adam.BITS)
def test_real_states_have_the_computed_bytes(name: str, dtype: torch.dtype, make: Any) -> None:
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in (*CODED, *PLAIN)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(name, parameters)
    with torch.compiler.set_stance("force_eager"):  # compiling takes minutes
        optimizer.step()
    for parameter in parameters:
        state, values = optimizer.state[parameter], parameter.numel()
        expected = low_bit_adam.state_bytes(name, values, dtype.itemsize)
        assert [bytes_of(state[each]) for each in ("exp_avg", "exp_avg_sq")] == [expected] * 2, parameter.shape
        assert low_bit_adam.has_codes(values) == (tuple(parameter.shape) in CODED)


def test_all_of_torchaos_optimizers_are_known() -> None:
    assert set(low_bit_adam.BITS) == set(ROUNDING_OPTIMIZERS)


def test_other_optimizers_run_without_a_stand_in() -> None:
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    with low_bit_adam.fake_update("sgd"):
        torch.optim.SGD([parameter], lr=1.0).step()
    assert parameter.tolist() == [0, 0, 0, 0]
