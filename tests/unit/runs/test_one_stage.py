"""A stage's memory is measured and freed, and failures of the machine are explained in one line."""

import errno
import gc
import resource
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from composing import composed_quickly
from conftest import run_program
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

from pipeline import __main__ as program
from pipeline.config import Device, Method, PipelineConfig, Sharding, Stage, rules
from pipeline.doctor.fake_gpu import pretend_cuda
from pipeline.errors import MachineError
from pipeline.runs.durable import write_text
from pipeline.runs.memory_remedies import remedies
from pipeline.runs.one_stage import one_stage

GPU_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.10 GiB of which 1.20 GiB is free."
    " Including non-PyTorch memory, this process has 77.90 GiB memory in use. Of the allocated memory 70.00 GiB is"
    " allocated by PyTorch, and 7.00 GiB is reserved by PyTorch but unallocated."
)
HOST_TEXT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1152921504606846976 bytes"


@cache
def resolved(*overrides: str) -> PipelineConfig:
    """Resolve a configuration. Tests must not change it."""
    program.register()
    with composed_quickly(), initialize_config_dir(str(program.CONF_DIR), version_base="1.3"):
        return rules.resolve(compose("config", list(overrides)))


def message_of(error: Exception, config: PipelineConfig) -> str:
    with pytest.raises(MachineError) as raised, one_stage(config):
        raise error
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_full_gpu_is_explained_with_its_amounts_and_what_to_set() -> None:
    config = resolved("recipe=multilingual", "stage=sft", "sft.batch_size=4", "sft.gradient_accumulation_steps=4")
    message = message_of(torch.OutOfMemoryError(GPU_TEXT), config)
    assert message.startswith(
        "stage=sft ran out of GPU memory: it asked for 2.00 GiB more, and 1.20 GiB of 79.10 GiB were free on GPU 3. Set"
    )
    assert "sft.batch_size=1 sft.gradient_accumulation_steps=16, " in message


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory\nCUDA kernel errors might be", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"]
)
def test_a_full_gpu_is_recognized_outside_of_torchs_allocator(text: str) -> None:
    message = message_of(RuntimeError(text), PipelineConfig(stage=Stage.quantize))
    assert message.startswith("stage=quantize ran out of GPU memory.")


def test_an_allocation_that_the_host_refuses_is_explained() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert HOST_TEXT in str(refused.value)
    message = message_of(refused.value, PipelineConfig(stage=Stage.export))
    assert message.startswith(f"stage=export ran out of host memory: it asked for {2**30:.2f} GiB more, ")
    assert message.endswith(" GiB are free. Use a machine with more memory.")


def test_a_memory_error_of_python_is_explained() -> None:
    assert message_of(MemoryError(), PipelineConfig(stage=Stage.upcast)).startswith("stage=upcast ran out of host")


def test_a_missing_kernel_is_explained() -> None:
    error = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nCUDA")
    assert "has no kernels for the GPU" in message_of(error, PipelineConfig(stage=Stage.evaluate))


@contextmanager
def small_files() -> Iterator[None]:
    """Inside the block, no file can grow beyond 4096 bytes. A full disk fails in the same places."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda path: torch.save(torch.zeros(4096), path), "torch could not write a file; the disk may be full"),
        (lambda path: save_file({"a": torch.zeros(4096)}, path), "a file could not be written (File too large)"),
        (lambda path: write_text(path, "x" * 8192), "a file could not be written (File too large)"),
    ],
    ids=["torch", "safetensors", "python"],
)
def test_a_file_that_cannot_be_written_is_explained(tmp_path: Path, write: Callable[[Path], None], what: str) -> None:
    with small_files(), pytest.raises(Exception) as failed:
        write(tmp_path / "file")
    message = message_of(failed.value, PipelineConfig(stage=Stage.sft, run_dir="runs/mine"))
    assert message == (
        f"stage=sft: {what}. Check the disk of run_dir=runs/mine. Then go on: the same command, without overwrite=true"
    )


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (Exception("Input/output error (os error 5)"), "a file could not be read or written (Input/output error)"),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:747] . open file failed with strerror: Disk quota exceeded"
            ),
            "torch could not write a file; the disk may be full",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "torch could not write a file; the disk may be full"),
    ],
    ids=["tokenizers", "torch", "torch at its end"],
)
def test_errors_of_libraries_that_raise_no_oserror_are_explained(error: Exception, what: str) -> None:
    message = message_of(error, PipelineConfig(stage=Stage.sft, run_dir="runs/mine"))
    assert message.startswith(f"stage=sft: {what}. Check the disk of run_dir=runs/mine.")


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.ENOSPC, "written (No space left on device)"),
        (errno.EDQUOT, "written (Disk quota exceeded)"),
        (errno.EIO, "read or written (Input/output error)"),
    ],
)
def test_a_disk_error_is_named_with_the_file(number: int, what: str) -> None:
    error = OSError(number, "text", "runs/mine/sft/metrics.jsonl")
    message = message_of(error, PipelineConfig(stage=Stage.sft))
    assert f"stage=sft: runs/mine/sft/metrics.jsonl could not be {what}. Check the disk of" in message


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "no file"), RuntimeError("an index is off"), ValueError("CUDA out of memory")],
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, one_stage(PipelineConfig(stage=Stage.sft)):
        raise error
    assert raised.value is error


def test_the_program_leaves_with_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(_: PipelineConfig) -> None:
        raise torch.OutOfMemoryError(GPU_TEXT)

    stage = types.ModuleType("pipeline.stages.qat")
    stage.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stage.__name__, stage)
    assert run_program("stage=qat", "recipe=smoke", f"run_dir={tmp_path}") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: stage=qat ran out of GPU memory") and captured.err.count("\n") == 1


def wasteful(stage: Stage, *settings: str) -> PipelineConfig:
    """Make a configuration that wastes memory in every stage, and add settings. The rules for `stage` are checked."""
    config = resolved(
        *("stage=doctor", "sft.batch_size=2", "sft.gradient_checkpointing=false", "qat.batch_size=2"),
        *("qat.gradient_checkpointing=false", "qat.distillation.weight=0.5", "qat.rounded_cache_gib=4"),
        *("sharding=fsdp2", "sft.reshard_after_forward=false", "qat.reshard_after_forward=false"),
        *("eval=quick", "evaluate.generation.batch_size=2", "data.path=rows.jsonl", "quantize.batch_size=2"),
        *settings,
    )
    found = replace(config, stage=stage)
    assert rules.problems(found) == []
    return found


@pytest.mark.parametrize("stage", list(Stage))
def test_every_remedy_is_a_setting_of_the_stage_and_changes_the_configuration(stage: Stage) -> None:
    config = wasteful(stage)
    for on_gpu in (True, False):
        for remedy in remedies(config, on_gpu):
            words = remedy.partition(" (")[0].split()
            settings = [] if words[0].startswith("CUDA_") else words
            changed = wasteful(stage, *settings)
            assert changed != config or not settings
            assert remedy not in remedies(changed, on_gpu) or "max_length" in remedy or not settings


def test_remedies_that_the_run_has_already_are_not_named() -> None:
    config = resolved("recipe=multilingual_full", "stage=qat", "train@qat=lora", "data.max_length=512")
    assert remedies(config, on_gpu=True) == []
    assert remedies(replace(config, sharding=Sharding.none), on_gpu=True) == [
        "sharding=fsdp2 (on several GPUs, with scripts/launch)"
    ]
    full = replace(config, qat=replace(config.qat, method=Method.full))
    assert remedies(full, on_gpu=True) == ["train@qat=bf16_parts", "train@qat=lora"]
    parts = replace(config, qat=replace(config.qat, method=Method.bf16_parts))
    assert remedies(parts, on_gpu=True) == ["train@qat=lora"]
    export = PipelineConfig(stage=Stage.export)
    assert remedies(export, on_gpu=True) == ["device=cpu"]
    assert remedies(replace(export, device=Device.cpu), on_gpu=True) == remedies(export, on_gpu=False) == []


def test_packed_experts_are_a_remedy_for_adapters_on_decoded_ones() -> None:
    remedy = "upcast.experts=packed (run stage=upcast again with overwrite=true, then the stages after it)"
    lora = ("recipe=smoke_lora", "upcast.experts=bf16")
    for stage in ("sft", "qat"):
        assert remedies(resolved(f"stage={stage}", *lora), on_gpu=True)[0] == remedy
    for arguments in (("recipe=smoke_lora",), ("recipe=smoke", "upcast.experts=bf16", "train@qat=lora")):
        assert remedy not in remedies(resolved("stage=qat", *arguments), on_gpu=True)


def test_peaks_of_gpu_memory_start_anew_with_each_stage() -> None:
    happened: list[str] = []
    with (
        pretend_cuda(),
        patch.object(torch.cuda, "reset_peak_memory_stats", lambda: happened.append("reset")),
        patch.object(torch.cuda, "empty_cache", lambda: happened.append("emptied")),
    ):
        for _ in range(2):
            with one_stage(PipelineConfig(stage=Stage.sft)):
                happened.append("ran")
    assert happened == ["reset", "ran", "emptied"] * 2


def test_a_model_in_a_reference_cycle_is_freed_after_its_stage() -> None:
    class Model:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        with one_stage(PipelineConfig(stage=Stage.sft)):
            left = weakref.ref(Model())
        assert left() is None
    finally:
        gc.enable()


def test_a_stage_that_is_up_to_date_collects_no_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection takes a quarter of a second in a process that has imported the libraries."""
    released: list[str] = []
    monkeypatch.setattr("pipeline.runs.one_stage.release", lambda: released.append("released"))
    for _ in range(2):
        assert run_program("stage=upcast", "recipe=smoke", f"run_dir={tmp_path}") == 0
        assert released == ["released"]
