"""A GPU that computes on the CPU, for tests of the program on machines without one.

`gpu()` makes torch report CUDA devices. Tensors on these devices are `PretendedTensor`s. Each says that it is on
cuda:0, but its values are in a CPU tensor. As with CUDA, an operation fails if it mixes these tensors with CPU tensors.
`SYNCS` counts the operations that would make the host wait for the GPU, separately for each source line.

The pretended GPU finds tensors on the wrong device, host syncs, and errors in code that only a GPU runs. It cannot find
wrong CUDA kernels, a lack of memory, or slow code. It changes the whole process, so use it in a process of its own.
"""

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.doctor import fake_gpu
from pipeline.models import sink_attention

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_aten: Any = torch.ops.aten


# --- host syncs -------------------------------------------------------------------------------------------------------

_ROOT = Path(__file__).parents[1]
_LIBRARIES = ("trl", "transformers", "accelerate", "peft", "modelopt")
_STEPS = "_run_epoch"  # the loop over optimizer steps in transformers' trainer
_BETWEEN_STEPS = "_maybe_log_save_evaluate"  # its logs, checkpoints and validations


class Sync(NamedTuple):
    """An operation for which the host waits for the GPU.

    Attributes:
        source: file and line, for example `pipeline/numerics/codec.py:301`. The file of a library begins with the
            library's name. The source of an operation that autograd starts is `backward`.
        what: kind of operation, for example `item`.
        is_in_step: whether it ran in an optimizer step. Validation, logging and saving do not count as part of a step.
    """

    source: str
    what: str
    is_in_step: bool


SYNCS: Counter[Sync] = Counter()
"""Number of times that each sync happened in this process."""


def _note(what: str) -> None:
    if threading.current_thread() is not threading.main_thread():  # autograd uses another thread on GPUs
        SYNCS[Sync("backward", what, True)] += 1
        return
    frames = list(_frames(sys._getframe(1)))
    functions = {frame.f_code.co_name for frame in frames}
    source = next((found for found in map(_source, frames) if found), "unknown")
    SYNCS[Sync(source, what, _STEPS in functions and _BETWEEN_STEPS not in functions)] += 1


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _source(frame: FrameType) -> str | None:
    """Return the file and line of a frame. Return None if the code is not in `pipeline` or in one of `_LIBRARIES`."""
    path = Path(frame.f_code.co_filename)
    if path.is_relative_to(_ROOT / "pipeline"):
        return f"{path.relative_to(_ROOT)}:{frame.f_lineno}"
    name = path.as_posix().rpartition("/site-packages/")[2]
    return f"{name}:{frame.f_lineno}" if name.startswith(tuple(f"{each}/" for each in _LIBRARIES)) else None


# --- tensors ----------------------------------------------------------------------------------------------------------


class PretendedTensor(Tensor):
    """A tensor that says it is on cuda:0. Its values are in a CPU tensor, `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendedTensor":
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CUDA
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.held!r})"

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return PretendedTensor(self.held.detach())

    @data.setter
    def data(self, value: Tensor) -> None:
        same = isinstance(value, PretendedTensor) and (value.dtype, value.shape) == (self.dtype, self.shape)
        if not same or value.stride() != self.stride():
            raise NotImplementedError("a new value of .data on another device, or with another type or layout")
        self.held = value.held

    def tolist(self) -> Any:
        _note("tolist")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.cpu().numpy(force=True)

    def __array__(self, *_: object, **__: object) -> Any:
        return self.numpy()

    def pin_memory(self, *_: object) -> Tensor:  # type: ignore[override]
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: object) -> Tensor:
        with torch.no_grad():
            copied = PretendedTensor(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(copied, self.requires_grad)
        return copied.requires_grad_(self.requires_grad)


class _Mode(TorchDispatchMode):
    """Sees operations without a `PretendedTensor`, such as `torch.zeros(2, device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        return _dispatch(func, args, kwargs or {})


# --- operations -------------------------------------------------------------------------------------------------------

_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
)
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_FILLS = (_aten.fill_.Tensor, _aten.fill.Tensor, _aten.masked_fill.Tensor, _aten.masked_fill_.Tensor)
_WAITS = {
    _aten._local_scalar_dense.default: "item",
    _aten.nonzero.default: "nonzero",
    _aten.is_nonzero.default: "bool",
    _aten.equal.default: "equal",
    _aten.masked_select.default: "masked_select",
    _aten._unique2.default: "unique",
    _aten.unique_dim.default: "unique",
    _aten.unique_consecutive.default: "unique",
    _aten.bincount.default: "bincount",
    _aten.repeat_interleave.Tensor: "repeat_interleave",
}


def _dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    tensors = _tensors([*args, *kwargs.values()])
    has_gpu = any(isinstance(each, PretendedTensor) for each in tensors)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not has_gpu and (asked is None or asked.type != "cuda"):
        return func(*args, **kwargs)
    if has_gpu:
        _refuse_mixed_devices(func, args, tensors)
    _note_wait(func, args, kwargs)
    _refuse_generator_of_the_cpu(kwargs)
    bare_args, bare_kwargs = _bare(args), {name: _bare(value) for name, value in kwargs.items()}
    if asked is not None:
        bare_kwargs["device"] = _CPU
    found = _compute(func, bare_args, bare_kwargs)
    is_on_gpu = isinstance(args[0], PretendedTensor) if func is _aten.copy_.default else _on_gpu(asked)
    return _with_written(func, args, kwargs, _wrap(found) if is_on_gpu else found)


def _on_gpu(asked: torch.device | None) -> bool:
    return asked is None or asked.type == "cuda"


# Operators get and return tensors, numbers and lists of them. torch's functions for trees take longer than operators.


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


def _bare(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_bare, value))
    return value.held if isinstance(value, PretendedTensor) else value


def _wrap(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_wrap, value))
    return PretendedTensor(value) if isinstance(value, Tensor) and not isinstance(value, PretendedTensor) else value


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU. Operations that only CUDA has are replaced."""
    if func is _aten._flash_attention_forward.default:
        return _flash_forward(*args, **kwargs)
    if func is _aten._flash_attention_backward.default:
        return _flash_backward(*args, **kwargs)
    if func is _aten.histc.default and not args[0].is_floating_point():
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    if func is _aten.addmm.dtype_out:
        added, one, other = args[:3]
        return kwargs["out"].copy_(torch.addmm(added, one.float(), other.float()))
    return func(*args, **kwargs)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, _: Tensor, longest: int, *__: Any, **layer: Any
) -> tuple[Tensor, ...]:
    out, lse = sink_attention._forward_on_cpu(query, key, value, bounds, _layer(longest, **layer))
    return out, lse, torch.zeros(2), torch.zeros(2), torch.empty(0)


def _flash_backward(*args: Any, **layer: Any) -> tuple[Tensor, ...]:
    *tensors, total, bounds, _, longest = args[:9]  # gradient, query, key, value, output, log-sum-exp
    made = _layer(longest, **layer)
    return sink_attention._backward_on_cpu(*tensors, total=total, bounds=bounds, layer=made)


def _layer(longest: int, scale: float, window_size_left: int | None = None) -> Any:
    return sink_attention._Layer(longest, None if window_size_left is None else window_size_left + 1, scale)


def _with_written(func: Any, args: Sequence[Any], kwargs: dict[str, Any], found: Any) -> Any:
    """Let an operation that writes to an argument, such as `add_`, return this argument and not a new tensor."""
    if torch.Tag.inplace_view in func.tags and (args[0].shape, args[0].stride()) != (found.shape, found.stride()):
        raise NotImplementedError(f"{func} changes the shape of a tensor in place")
    places = _places_of_written(func)
    if not places:
        return found
    written = {
        name: kwargs.get(argument, args[place] if place < len(args) else None) for name, place, argument in places
    }
    aliases = [result.alias_info for result in func._schema.returns]
    kept = [next((written[n] for n in (a.before_set if a else ()) if n in written), None) for a in aliases]
    if len(kept) == 1 and kept[0] is not None:
        return kept[0]
    if any(each is not None for each in kept):
        return tuple(new if old is None else old for new, old in zip(found, kept, strict=True))
    return found


@functools.cache
def _places_of_written(func: Any) -> list[tuple[str, int, str]]:
    """Return alias set, place and name of each argument that an operation writes to."""
    return [
        (name, place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for name in argument.alias_info.before_set
    ]


def _refuse_mixed_devices(func: Any, args: Sequence[Any], tensors: list[Tensor]) -> None:
    """Raise for the operations that CUDA refuses because a tensor is on the CPU."""
    on_cpu = [each for each in tensors if not isinstance(each, PretendedTensor)]
    if not on_cpu or func in _COPIES:
        return
    numbers = [each for each in on_cpu if each.dim() == 0]
    if func in _INDEXING and isinstance(args[0], PretendedTensor):
        values = args[2] if len(args) > 2 else None
        if values is None or isinstance(values, PretendedTensor) or values.dim() == 0:
            return
    is_pointwise = torch.Tag.pointwise in func.tags or func in _FILLS
    if is_pointwise and len(on_cpu) == len(numbers) == 1 and not _is_written(func, args, numbers[0]):
        return
    found = [(tuple(each.shape), "cuda:0" if isinstance(each, PretendedTensor) else "cpu") for each in tensors]
    raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {found}")


def _is_written(func: Any, args: Sequence[Any], tensor: Tensor) -> bool:
    infos = (argument.alias_info for argument in func._schema.arguments)
    pairs = zip(args, infos, strict=False)
    return any(arg is tensor for arg, info in pairs if info is not None and info.is_write)


def _refuse_generator_of_the_cpu(kwargs: dict[str, Any]) -> None:
    generator = kwargs.get("generator")
    if generator is not None and getattr(generator, "pretended", _CPU).type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _note_wait(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if func in _WAITS:
        _note(_WAITS[func])
    elif func in _INDEXING:
        _note_wait_of_index(func, args)
    elif func in _COPIES and not (kwargs.get("non_blocking") or (func is _COPIES[0] and True in args[2:])):
        to = args[0].device if func is _COPIES[0] else torch.device(kwargs.get("device") or args[0].device)
        source = args[1] if func is _COPIES[0] else args[0]
        if to.type == "cpu" and isinstance(source, PretendedTensor):
            _note("to cpu")
        elif to.type == "cuda" and not isinstance(source, PretendedTensor) and source.dim():
            _note("to cuda")


def _note_wait_of_index(func: Any, args: Sequence[Any]) -> None:
    """Note each time that indexing makes the host wait.

    CUDA copies an index that is on the CPU. If the index is a mask, CUDA counts its true values. It does not count them
    if a single value fills all selected places.
    """
    if any(isinstance(each, Tensor) and not isinstance(each, PretendedTensor) and each.dim() for each in args[1]):
        _note("to cuda")
    masks = [each for each in args[1] if isinstance(each, PretendedTensor) and each.dtype in (torch.bool, torch.uint8)]
    is_fill = func is not _aten.index.Tensor and args[2].numel() == 1 and not (len(args) > 3 and args[3])
    if masks and not is_fill:
        _note("boolean index")


# --- the process ------------------------------------------------------------------------------------------------------


@contextmanager
def gpu(count: int = 1) -> Iterator[None]:
    """Until the `with` block ends, pretend that this machine has `count` GPUs. All of them are cuda:0."""
    fake_gpu.install()
    import transformers.pytorch_utils  # reads torch.cuda at its first import, so before the changes
    import trl  # noqa: F401
    from torch.optim.optimizer import _foreach_supported_types

    _foreach_supported_types.append(PretendedTensor)  # so that optimizers take the path that they take on GPUs
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device="cuda") is made on the CPU and then copied
    states = {
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
    }
    with (
        fake_gpu.pretend_cuda(count),
        patch.multiple(torch.cuda, **states),
        patch.multiple(torch.cuda.random, **states),
        patch.object(torch, "Generator", _Generator),
        patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor),
        patch.multiple(transformers.pytorch_utils, **_of_held(transformers.pytorch_utils)),
        _interpreted_kernels(),
        _Mode(),
    ):
        yield


class _Generator(torch.Generator):
    """A generator of random numbers that works on the CPU, but says that it is on the given device."""

    pretended: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> "_Generator":
        made = super().__new__(cls, "cpu")
        made.pretended = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.pretended


def _of_held(module: Any) -> dict[str, Callable[[Tensor], object]]:
    """Replace functions that detect shared memory by functions that look at the held CPU tensors."""

    def of_held(function: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        return lambda tensor: function(_bare(tensor))

    return {name: of_held(getattr(module, name)) for name in ("storage_ptr", "storage_size") if hasattr(module, name)}


@contextmanager
def _interpreted_kernels() -> Iterator[None]:
    """Run TRL's Triton kernels on the CPU tensors with Triton's interpreter, which needs TRITON_INTERPRET=1."""
    import trl.kernels.chunked_logprob as chunked

    if not chunked._TRITON_AVAILABLE:  # TRL then computes the same with torch
        yield
        return
    names = ("_forward_kernel", "_backward_kernel")
    with patch.multiple(chunked, **{name: _Interpreted(getattr(chunked, name)) for name in names}):
        yield


class _Interpreted:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def run(*args: object, **kwargs: object) -> None:
            self._kernel[grid](*map(_bare, args), **{name: _bare(value) for name, value in kwargs.items()})

        return run
