"""A kernel is compiled if this pays off and a compiler works.

tests/integration/test_compiled_codec.py compiles the kernels, and compares their bits.
"""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pipeline.numerics import compiled
from pipeline.numerics.compiled import Compilation, can_compile, compilation

Kernel = Callable[..., Tensor]
Calls = list[str]
LARGE = 1 << 16  # values; calls with smaller tensors do not count towards compilation


@pytest.fixture(autouse=True)
def unchanged_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins with the state of a new process."""
    monkeypatch.setattr(compiled, "_mode", Compilation.when_it_pays)
    monkeypatch.setattr(compiled, "_gave_up", False)
    can_compile.cache_clear()
    yield
    can_compile.cache_clear()


@pytest.fixture
def calls() -> Calls:
    """A record of each run of the kernel `doubled`, in order: eager, static or dynamic."""
    return []


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> Kernel:
    """A kernel whose compiled forms are fakes that record their calls. The program believes that a compiler works."""

    def compile_(function: Kernel, dynamic: bool, **_: object) -> Kernel:
        def run(values: Tensor) -> Tensor:
            calls.append("dynamic" if dynamic else "static")
            return 2 * values

        return run

    def function(values: Tensor) -> Tensor:
        calls.append("eager")
        return 2 * values

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiled, "can_compile", lambda device_type: True)
    return compiled.kernel(function)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel with a compiler that fails."""

    def compile_(function: Kernel, dynamic: bool, **_: object) -> Kernel:
        def run(values: Tensor) -> Tensor:
            raise torch._dynamo.exc.InternalTorchDynamoError("the compiler is out of order\nand more lines")

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(compiled, "can_compile", lambda device_type: True)
    return compiled.kernel(lambda values: 2 * values)


def test_a_kernel_is_eager_until_compiling_pays_off(
    doubled: Kernel, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_PAYS_AFTER", 2 * LARGE)
    for _ in range(3):
        doubled(torch.ones(LARGE))
    assert calls == ["eager", "static", "static"]


def test_each_kernel_counts_its_own_work(doubled: Kernel, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_PAYS_AFTER", 2 * LARGE)
    compiled.kernel(lambda values: values + 1)(torch.ones(LARGE))
    doubled(torch.ones(LARGE))
    assert calls == ["eager"]


def test_small_tensors_are_not_counted(doubled: Kernel, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small tensors, calling the operations takes most of the time. Compiling does not make calls faster."""
    monkeypatch.setattr(compiled, "_PAYS_AFTER", LARGE)
    small = torch.ones(LARGE - 1)
    for _ in range(3):
        doubled(small)
    assert calls == ["eager"] * 3


def test_a_test_or_a_small_model_never_waits_for_a_compiler() -> None:
    """A tiny model has about 10^5 expert weights. The smoke recipe rounds these weights a hundred
    times, which makes 10^7 values.
    """
    assert compiled._PAYS_AFTER > 1e8


def test_weights_are_compiled_for_their_shape_and_activations_for_any(doubled: Kernel, calls: Calls) -> None:
    """The memory order distinguishes weights from activations.

    Weights have contiguous lanes, and activations have contiguous blocks.
    """
    with compilation(Compilation.always):
        doubled(torch.ones(4, 3))
        doubled(torch.ones(3, 4).t())
    assert calls == ["static", "dynamic"]


def test_the_mode_holds_inside_the_block_and_not_after_it(doubled: Kernel, calls: Calls) -> None:
    with compilation(Compilation.always):
        doubled(torch.ones(1))
        with compilation(Compilation.never):
            doubled(torch.ones(1))
        doubled(torch.ones(1))
    doubled(torch.ones(1))
    assert calls == ["static", "eager", "static", "eager"]


def test_never_means_never(doubled: Kernel, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_PAYS_AFTER", 0)
    with compilation(Compilation.never):
        doubled(torch.ones(LARGE))
    assert calls == ["eager"]


def test_an_error_inside_the_block_restores_the_mode() -> None:
    with pytest.raises(RuntimeError), compilation(Compilation.always):
        raise RuntimeError
    assert compiled._mode is Compilation.when_it_pays


def test_a_failing_compiler_gives_one_warning_and_the_work_continues(broken: Kernel) -> None:
    with compilation(Compilation.always):
        with pytest.warns(UserWarning, match="torch.compile failed, .*: the compiler is out of order$"):
            assert torch.equal(broken(torch.ones(3)), torch.full((3,), 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(broken(torch.ones(3)), torch.full((3,), 2.0))


def test_kernels_record_no_gradients(doubled: Kernel) -> None:
    """Kernels record no gradient, because the codec defines its own. So one compiled form serves both grad modes."""
    weight = torch.ones(3, requires_grad=True)
    for mode in (Compilation.never, Compilation.always):
        with compilation(mode):
            assert not doubled(weight).requires_grad
            with torch.no_grad():
                doubled(weight)
            assert torch.is_grad_enabled()


def test_errors_of_the_kernel_itself_are_raised(broken: Kernel) -> None:
    with compilation(Compilation.never), pytest.raises(TypeError):
        broken()


def test_without_a_compiler_kernels_stay_eager(doubled: Kernel, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "can_compile", lambda device_type: False)
    with compilation(Compilation.always):
        doubled(torch.ones(3))
    assert calls == ["eager"]


@pytest.mark.parametrize(
    ("environment", "installed", "expected"),
    [
        (None, set(), False),
        (None, {"g++"}, True),
        (None, {"clang++"}, True),
        ("/opt/bin/c++", {"/opt/bin/c++"}, True),
        ("/opt/bin/c++", set(), False),
    ],
)
def test_a_cpu_needs_a_cpp_compiler(
    environment: str | None, installed: set[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if environment is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", environment)
    monkeypatch.setattr("shutil.which", lambda name: name if name in installed else None)
    assert can_compile("cpu") is expected


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_gpu_needs_triton(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if is_installed else None)
    assert can_compile("cuda") is is_installed


def test_a_large_job_is_compiled_from_its_first_value(doubled: Kernel, calls: Calls) -> None:
    with compiled.compilation_for(compiled._PAYS_AT_ONCE - 1):
        doubled(torch.ones(2, 2))
    with compiled.compilation_for(compiled._PAYS_AT_ONCE):
        doubled(torch.ones(2, 2))
    doubled(torch.ones(2, 2))
    assert calls == ["eager", "static", "eager"]


def test_a_compiler_that_failed_in_a_large_job_is_not_tried_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled.compilation_for(compiled._PAYS_AT_ONCE), pytest.warns(UserWarning, match="torch.compile failed"):
        compiled._give_up(RuntimeError("no compiler today"))
    assert compiled._mode is Compilation.never
