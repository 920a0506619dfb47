"""Train a model of a few layers on fake tensors, to measure the memory that training takes on a GPU.

The model, adapters, quantizers, expert kernels, trainer and optimizer are made in the same way as in a real run. Fake
tensors have shapes and types but no values, so nothing is computed. A fake GPU changes the whole process, so each job
runs in its own process. `peaks.measure` starts a parent process (`python -m pipeline.doctor.fake_run`), writes the
jobs to its standard input, and reads the outcomes from its standard output. The parent process imports the libraries,
and forks once for each job.
"""

import gc
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.checkpoints.gpt_oss import GptOssJson
from pipeline.config import LoraConfig, Method, Precision, QatConfig, Sharding, TrainConfig
from pipeline.doctor import fake_gpu, forks, low_bit_adam
from pipeline.doctor.live_memory import LiveMemory
from pipeline.numerics.formats import BlockFormat

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel, TrainerCallback

    from pipeline.training.distillation import Teacher
    from pipeline.training.trainer import Inputs

LOAD, FORWARD, BACKWARD, OPTIMIZER = PHASES = ("load", "forward", "backward", "optimizer")
"""Phases of training whose peaks are measured."""

_AT_ONCE = 2  # each measurement uses one CPU core and up to 2 GB of memory
_PORT = "29500"


@dataclass(frozen=True)
class Job:
    """A training stage whose memory is measured.

    Attributes:
        model: content of the model's config.json.
        stage: name of the stage, for messages.
        train: settings of the stage.
        tokens: number of tokens in a row of a batch.
        block_format: format of the fake quantizers, or None without quantizers.
        cache_bytes: size limit of the quantizers' cache of rounded weights, in bytes.
        sharding: how the processes share the model.
        processes: number of processes. One of them is measured.
        is_packed: whether the experts stay packed.
        has_own_base: whether QAT has another base than SFT. A teacher is then a second model.
        on_gpu: whether the run trains on a GPU. Otherwise the fake GPU stands for the host.
    """

    model: GptOssJson
    stage: str
    train: TrainConfig
    tokens: int
    block_format: BlockFormat | None
    cache_bytes: float
    sharding: Sharding
    processes: int
    is_packed: bool = False
    has_own_base: bool = False
    on_gpu: bool = True


@dataclass(frozen=True)
class Size:
    """Number of layers of a model, and how many of them have adapters."""

    layers: int
    adapted: int


Request = tuple[Job, list[Size]]
Outcome = list[dict[str, int]] | str


class _FakeMode(FakeTensorMode):
    """Fake tensors that never start CUDA, although `torch.cuda.is_available()` returns True."""

    avoid_device_init = True


class _Answers(TorchDispatchMode):
    """Replaces operations that need values, because fake tensors have none.

    A scalar that is read from a tensor is 1 or True. A boolean mask selects all elements. So every loss is finite,
    every batch has tokens, and all tokens are supervised.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or return an answer in its place."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.long, device=args[0].device)
        if func is torch.ops.aten.index.Tensor and _is_mask(args[1]):
            mask = args[1][0]
            return args[0].reshape(-1, *args[0].shape[mask.dim() :]).clone()
        return func(*args, **(kwargs or {}))


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


def _is_mask(indices: list[Tensor | None]) -> bool:
    return bool(indices) and indices[0] is not None and indices[0].dtype is torch.bool


def measure(job: Job, size: Size) -> dict[str, int]:
    """Train a model of this size for two steps on fake tensors.

    Returns:
        For each phase, the peak bytes on the GPU of one process.
    """
    memory = LiveMemory()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kernels = (_fake_kernels(job.on_gpu), low_bit_adam.fake_update(job.train.optimizer))
        for context in (fake_gpu.pretend_cuda(), _processes(job.processes), _mesh(job), *kernels):
            stack.enter_context(context)
        fake = _FakeMode(allow_non_fake_inputs=True)
        with fake, memory, _Answers():
            inputs = _make_inputs(job, size)
        _train(inputs, job, directory, fake=fake, memory=memory)
    return memory.peaks


def _make_inputs(job: Job, size: Size) -> "Inputs":
    """Make the model with its adapters, quantizers and teacher, as the stages do."""
    from pipeline.models import adapters, fake_quantizers, loading
    from pipeline.training.trainer import Inputs

    model, train, rounded = _make_plain(job, size), _of_size(job.train, size), None
    if train.method is Method.bf16_parts:
        loading.freeze_experts(model)
    if train.method is Method.lora:
        model = adapters.attach(model, train, job.stage, is_factored=job.block_format is None)
    if job.block_format is not None:
        fake_quantizers.insert(model, job.block_format, lambda _: None)
    loading.set_up_to_train(model, train, job.block_format)
    _shard(model, job)
    teacher = _teacher(job, size)
    if job.block_format is not None:
        is_shared = teacher is not None and teacher.model is None
        rounded = fake_quantizers.keep_rounded(model, job.cache_bytes, keeps_frozen=is_shared)
    unused: Any = None  # there is no validation
    return Inputs(model, _tokenizer(), _splits(), unused, rounded, teacher, _watchers(model, job))


def _watchers(model: "PreTrainedModel", job: Job) -> "list[TrainerCallback]":
    from pipeline.training import oscillation

    if not isinstance(job.train, QatConfig) or job.block_format is None:
        return []
    return [*oscillation.watch(model, job.train, job.block_format, job.sharding)]


def _shard(model: "PreTrainedModel", job: Job) -> None:
    from pipeline.models import fsdp2, loading

    if job.processes > 1:
        fsdp2.shard(model, loading.is_mixed(job.train))


def _make_plain(job: Job, size: Size) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM, GptOssConfig

    from pipeline.models import attention, packed_experts, sink_attention  # noqa: F401  registers fused_sinks
    from pipeline.models.loading import TRAIN_DTYPES

    known: dict[str, Any] = {name: value for name, value in job.model.items() if name != "quantization_config"}
    known |= {"num_hidden_layers": size.layers, "layer_types": (known.get("layer_types") or [])[: size.layers] or None}
    dtype = TRAIN_DTYPES[job.train.precision]
    # FSDP2 moves the layers to the GPU one by one. Fake tensors cannot be moved, so they are created on the GPU.
    with torch.device("cuda" if job.processes > 1 else "cpu"):
        model = AutoModelForCausalLM.from_config(
            GptOssConfig(**known),
            dtype=dtype,
            attn_implementation=attention.for_training(job.train, attention.capability() if job.on_gpu else None),
        )
        if job.is_packed:
            computes_in = torch.bfloat16 if job.train.precision is Precision.mixed_bf16 else dtype
            packed_experts.replace(model, dtype, computes_in)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _of_size(train: TrainConfig, size: Size) -> TrainConfig:
    """Return settings that give adapters to the last `size.adapted` layers."""
    layers = list(range(size.layers - size.adapted, size.layers))
    return replace(train, lora=LoraConfig(**{**vars(train.lora), "layers": layers, "every_nth": None}))


def _teacher(job: Job, size: Size) -> "Teacher | None":
    from pipeline.models import loading
    from pipeline.training.distillation import Teacher, holds_second_model

    if not (isinstance(job.train, QatConfig) and job.train.distillation.weight):
        return None
    settings = job.train.distillation
    if not holds_second_model(job.train, loading.TRAIN_DTYPES[job.train.precision], has_own_base=job.has_own_base):
        # The memory of SFT's adapters is not counted.
        return Teacher(None, settings.weight, settings.temperature)
    model = _make_plain(job, size).eval().requires_grad_(False)
    _shard(model, job)
    loading.set_up_to_train(model, job.train, None)
    return Teacher(model.to("cuda"), settings.weight, settings.temperature)


def _train(inputs: "Inputs", job: Job, directory: Path, *, fake: FakeTensorMode, memory: LiveMemory) -> None:
    from pipeline.models import sharding
    from pipeline.training.trainer import Setup, make_trainer

    setup = Setup(job.train, job.stage, directory, job.sharding)
    with sharding.switch_on(job.sharding) as switches:
        trainer: Any = make_trainer(inputs, setup, {"eval_on_start": False, **switches})
        if job.train.gradient_checkpointing:  # `trainer.train` would do this
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        with fake, memory, _Answers():
            # accelerate wants an optimizer, but it finds parameters by their addresses and copies tensors of settings.
            # With fake tensors, it can do neither. So it gets an optimizer that is not used.
            model = trainer.accelerator.prepare(trainer.model, torch.optim.SGD(trainer.model.parameters()))[0]
            optimizer = trainer.create_optimizer()
            gc.collect()
            with memory.phase(LOAD):
                model.train()
                for callback in inputs.callbacks:
                    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
            for passes in (1, min(2, job.train.gradient_accumulation_steps)):
                _step(trainer, model, optimizer, job, passes=passes, memory=memory)


def _step(
    trainer: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, job: Job, *, passes: int, memory: LiveMemory
) -> None:
    """Run one step of the optimizer with several forward passes.

    The optimizer's states exist after the first step. In each step, gradients exist after the first pass. So the peak
    is in the second pass of the second step.
    """
    backward = trainer.accelerator.backward

    def in_phase(loss: Tensor, **arguments: object) -> None:
        with memory.phase(BACKWARD):
            backward(loss, **arguments)

    with patch.object(trainer.accelerator, "backward", in_phase):
        for number in range(passes):
            trainer.accelerator.gradient_state._set_sync_gradients(number == passes - 1)
            with memory.phase(FORWARD):
                trainer.training_step(model, _batch(job), torch.tensor(job.tokens, device="cuda"))
    with memory.phase(OPTIMIZER):
        trainer.accelerator.clip_grad_norm_(model.parameters(), job.train.max_grad_norm)
        optimizer.step()
        for callback in trainer.callback_handler.callbacks:  # empties the cache of rounded weights
            callback.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    model.zero_grad()


def _batch(job: Job) -> dict[str, Tensor]:
    """Make a batch that has the same shapes as a batch of the trainer's collator."""
    rows = 1 if job.train.packing else job.train.batch_size
    ids = torch.zeros(rows, job.tokens, dtype=torch.long, device="cuda")
    more = torch.arange(job.tokens, device="cuda")[None] if job.train.packing else torch.ones_like(ids)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids" if job.train.packing else "attention_mask": more}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<end>", bos_token="<end>")


def _splits() -> Any:
    """Make data that the trainer accepts. No batch is taken from it."""
    from datasets import Dataset

    from pipeline.data.examples import Splits

    data = Dataset.from_dict({"input_ids": [[0, 1]], "labels": [[0, 1]]})
    return Splits(data, data, {}, 2, np.zeros(1, dtype=np.int64))


@contextmanager
def _processes(count: int) -> Iterator[None]:
    """Pretend that this process is the first of `count` processes. Collectives do nothing."""
    if count == 1:
        yield
        return
    import torch.distributed._tools.fake_collectives
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="localhost", MASTER_PORT=_PORT)
    if not distributed.is_initialized():
        distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    with patch.object(torch.accelerator, "current_stream", fake_gpu.FakeStream):  # FSDP2 waits with it
        yield


@contextmanager
def _mesh(job: Job) -> Iterator[None]:
    """Make the device mesh outside of fake mode, because torch 2.13 reads values of tensors to make it."""
    if job.processes == 1:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp._fully_shard import _fully_shard

    mesh: DeviceMesh = init_device_mesh("cuda", (job.processes,))
    with patch.object(_fully_shard, "_init_default_mesh", lambda *_, **__: mesh):
        yield


@contextmanager
def _fake_kernels(on_gpu: bool) -> Iterator[None]:
    """Replace kernels that run outside of torch. The replacements allocate memory but compute nothing."""
    from pipeline.models.packed_passes import DECODED_BYTES
    from pipeline.training import trainer

    with (
        trainer.no_triton_kernels(),
        patch("pipeline.models.quantizer_backend.fake_quantize", _allocate_rounded),
        patch("pipeline.training.oscillation.fake_quantize", _allocate_rounded),
        patch("pipeline.numerics.low_rank._for_each_expert", lambda _, base, *__: torch.empty_like(base)),
        patch("pipeline.models.packed_experts.decode", lambda *_, out: out),
        patch("pipeline.numerics.packed_rounding.round_packed", _allocate_merged),
        patch.dict(DECODED_BYTES, {} if on_gpu else {"cuda": DECODED_BYTES["cpu"]}),
    ):
        yield


def _allocate_merged(packed: tuple[Tensor, Tensor], *_: object, dtype: torch.dtype, **__: object) -> Tensor:
    """Allocate the result of `round_packed`. For a short time, also allocate each block's magnitude and divisor."""
    count, out, nb, half = packed[0].shape
    rounded = torch.empty(count, nb * half * 2, out, dtype=dtype, device=packed[0].device)
    torch.empty(3, count, out, nb, device=packed[0].device)
    return rounded


def _allocate_rounded(values: Tensor, *_: object, dtype: torch.dtype | None = None, **__: object) -> Tensor:
    """Allocate a tensor with the shape and type of the codec's result.

    The codec's other tensors are small, because it processes a stack in parts.
    """
    from pipeline.numerics.codec import straight_through

    return straight_through(values, torch.empty_like(values, dtype=dtype or values.dtype))


def main() -> None:
    """Read jobs with their sizes from standard input, and write the outcome of each job to standard output.

    The outcome is a list of the peaks of each size, or a text that says why measuring failed.
    """
    requests: list[Request] = pickle.load(sys.stdin.buffer)
    output, sys.stdout = sys.stdout, sys.stderr
    fake_gpu.install()
    _import_libraries()
    pickle.dump(forks.run(_measure, requests, at_once=_AT_ONCE), output.buffer)
    output.flush()


def _import_libraries() -> None:
    """Import the libraries that every job needs. The import takes longer than the measurement."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    from pipeline.models import adapters, fake_quantizers, packed_experts, sink_attention  # noqa: F401
    from pipeline.training import trainer  # noqa: F401

    AutoModelForCausalLM._model_mapping[GptOssConfig]  # imports the modules of gpt-oss


def _measure(request: Request) -> list[dict[str, int]]:
    job, sizes = request
    return [measure(job, size) for size in sizes]


if __name__ == "__main__":
    main()
