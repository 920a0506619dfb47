"""Train a model for SFT or QAT with TRL's trainer.

The trainer gets tokenized examples, computes our validation loss, and marks checkpoints as complete. Adapters and
quantizers are already in the model, so QAT runs the same code as SFT. This is the only module that imports trl.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from pipeline.config import Precision, Sharding, TrainConfig
from pipeline.data import tables
from pipeline.data.examples import Splits
from pipeline.data.harmony import IGNORED
from pipeline.data.tokenizers import Tokenizer
from pipeline.errors import UserError
from pipeline.models import losses, sharding
from pipeline.models.losses import Loss
from pipeline.models.rounded_weights import RoundedWeights
from pipeline.numerics.codec import CodecError
from pipeline.runs import stopping
from pipeline.runs.artifacts import CHECKPOINTS_DIR
from pipeline.runs.console import say, warn
from pipeline.runs.metrics import read_metrics
from pipeline.runs.processes import wait_for_everyone
from pipeline.runs.training_checkpoints import read_step
from pipeline.training import preemption, resume
from pipeline.training.callbacks import ForgetRounded, TokenCount, make_callbacks
from pipeline.training.determinism import deterministic_on_cpu
from pipeline.training.distillation import Teacher, distill
from pipeline.training.symptoms import warn_of_symptoms
from pipeline.training.trained_only import TrainedOnly
from pipeline.training.weight_changes import WeightChanges

_WHOLE_EXAMPLES = "bfd"  # best-fit decreasing: TRL's packing strategy that splits no example that fits into a row
_LOWEST_SAFE_BF16_RATE = 1e-4
_DIVERGENCE = "teacher_divergence"
_FIXED: dict[str, Any] = {
    "logging_nan_inf_filter": False,  # the filter would replace a non-finite loss by the mean of earlier losses
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "restore_callback_states_from_checkpoint": True,
    "ddp_find_unused_parameters": False,  # each step uses all parameters, as a layer's experts are one parameter
    "max_length": None,  # examples were truncated and counted when the data was prepared
    "shuffle_dataset": False,
    "packing_strategy": _WHOLE_EXAMPLES,
    "report_to": "none",
    "disable_tqdm": True,
}
"""Arguments of the trainer that no setting changes."""


@dataclass(frozen=True)
class Inputs:
    """A model to train and its data.

    Attributes:
        model: the model in training precision, with its adapters and quantizers; it is trained in place.
        tokenizer: the model's tokenizer.
        splits: tokenized examples.
        weight_changes: measures at each validation how much the experts have changed.
        rounded: cache of the model's rounded weights, or None. Training empties it when the weights change.
        teacher: the model to distil from, or None.
        callbacks: further callbacks for the trainer, for example to inspect the model at each validation.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    splits: Splits
    weight_changes: WeightChanges
    rounded: RoundedWeights | None = None
    teacher: Teacher | None = None
    callbacks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class Setup:
    """Settings and directory of a stage that trains.

    Attributes:
        settings: section `sft` or `qat` of the configuration.
        stage: name of the stage, for messages.
        directory: directory of the stage, for checkpoints and metrics.jsonl.
        sharding: how the model is sharded.
    """

    settings: TrainConfig
    stage: str
    directory: Path
    sharding: Sharding

    def divergence_error(self, reason: str) -> UserError:
        """Make the error for diverged training: the loss or the weights are not finite."""
        rate = f"{self.stage}.learning_rate={self.settings.learning_rate}"
        return UserError(f"{rate}: training diverged ({reason}). Lower it.")


def train(inputs: Inputs, setup: Setup) -> dict[str, Any]:
    """Train the model in place. Resume from the last complete checkpoint of the stage, if there is one.

    Returns:
        The number of steps, the step whose weights are kept, the training loss, the validation loss before and after
        training, and the counts of examples and tokens.

    Raises:
        UserError: transformers refuses a setting, or the launcher or a checkpoint contradicts the settings.
    """
    _warn_of_lost_updates(inputs.model, setup)
    if sharding.STRATEGIES[setup.sharding].hooks_gradients:
        # The backward pass gathers a layer only if the layer's input needs a gradient. If embeddings are frozen, the
        # input of the first layer needs none. After this call, it needs one.
        inputs.model.enable_input_require_grads()
    checkpoint = resume.find_last_complete(setup.directory / CHECKPOINTS_DIR, setup.stage, setup.sharding)
    with sharding.switch_on(setup.sharding) as switches:
        trainer = make_trainer(inputs, setup, {"eval_on_start": checkpoint is None, **switches})
        _run(trainer, setup, checkpoint)
    sharding.reshard(inputs.model)
    wait_for_everyone()  # until the main process has written all its metrics
    kept = trainer.state.best_global_step if setup.settings.keep_best else trainer.state.global_step
    return {
        "steps": trainer.state.global_step,
        "kept_step": kept,
        **_summarize_losses(setup, kept),
        **inputs.splits.counts,
    }


def _run(trainer: "_Trainer", setup: Setup, checkpoint: Path | None) -> None:
    resume.restore_records(setup.directory, setup.stage, checkpoint)
    if checkpoint is not None:
        say(setup.stage, f"resuming from step {read_step(checkpoint)}")
    try:
        with deterministic_on_cpu(), stopping.deferred(setup.stage, "after this step, with a checkpoint"):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (CodecError, FloatingPointError) as error:
        raise setup.divergence_error(str(error)) from error
    if trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()


def _summarize_losses(setup: Setup, kept: int | None) -> dict[str, float]:
    """Summarize the losses in metrics.jsonl. Unlike the trainer's averages, they include the steps before a resume."""
    lines = read_metrics(setup.directory)
    validation = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    training = [line["loss"] for line in lines if "loss" in line]
    if not all(math.isfinite(loss) for loss in (*validation.values(), *training)):
        raise setup.divergence_error("the loss is not finite")
    warn_of_symptoms(lines, setup.stage, setup.settings)
    assert kept is not None  # all losses are finite, so one of them is the lowest
    return {
        "train_loss_first": training[0],
        "train_loss_last": training[-1],
        "validation_loss_before": validation[0],
        "validation_loss": validation[kept],
    }


class _Trainer(TrainedOnly, SFTTrainer):
    """TRL's trainer with our validation loss, and with distillation if there is a teacher.

    `evaluate` is overridden because transformers 5.14 averages the validation loss over batches. Such an average
    depends on the batch size and differs from the loss that `stage=evaluate` reports. There is no public hook for a
    mean over tokens.
    """

    weight_changes: WeightChanges
    tokens: TokenCount
    preemption: preemption.Preemption
    evaluated_step: int | None = None
    _teacher: Teacher | None = None
    _loss_of_step = torch.zeros(())

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Overridden to stop all processes at the first non-finite loss, before this loss changes the weights."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._teacher is not None and self._teacher.model is not None:
            sharding.reshard(self._teacher.model)  # only now, as the backward pass uses the teacher's head again
        self._loss_of_step = self._loss_of_step + loss.detach()
        if self.accelerator.sync_gradients:
            # The signal travels with the loss, so it costs no collective and no synchronization of its own.
            both = torch.stack([self._loss_of_step, preemption.own_mark(self._loss_of_step)])
            total, marks = self.accelerator.reduce(both, "sum").tolist()
            self._loss_of_step = torch.zeros(())
            self.preemption.is_asked = marks > 0
            if not math.isfinite(total):
                raise FloatingPointError(f"the loss of step {self.state.global_step + 1} is not finite")
        return loss

    def learn_from(self, teacher: Teacher, strategy: sharding.ShardingStrategy) -> None:
        """Distil from the teacher in all later steps. If the teacher has its own model, shard this model too."""
        self._teacher = teacher
        if teacher.model is None:
            return
        model = strategy.shard_frozen(self.accelerator, teacher.model.requires_grad_(False))
        model.eval()  # DeepSpeed's eval() does not return the model
        self._teacher = replace(teacher, model=model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, object]:
        """Overridden to count tokens and to distil: TRL's `compute_loss_func` does not receive the inputs."""
        self.tokens.add(inputs)
        if self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            found = distill(model, self._teacher, inputs)
        supervised = (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        self._metrics["train"][_DIVERGENCE].append(found.divergence / supervised)
        if num_items_in_batch is None:
            return found.loss / supervised
        return found.loss / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Overridden to read divergences from the GPU once per line of metrics, not in every forward pass."""
        divergences = self._metrics["train"].get(_DIVERGENCE, [])
        divergences[:] = [float(each) for each in divergences]
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Overridden to report a validation loss that does not depend on the batch size."""
        loss = self._validation_loss()
        metrics = {
            f"{metric_key_prefix}_loss": loss.supervised,
            f"{metric_key_prefix}_loss_all_tokens": loss.over_all,
            f"{metric_key_prefix}_perplexity": loss.perplexity,
            **{f"{metric_key_prefix}_{name}": share for name, share in self.weight_changes.measure().items()},
        }
        self.log(metrics)
        self.evaluated_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self) -> Loss:
        """Compute the loss on all validation examples.

        Each of n processes runs every n-th batch. All run the same number of batches, because collectives in the
        forward pass need every process.
        """
        tokenizer: Any = self.processing_class
        model: Any = self.model
        examples: Any = self.eval_dataset
        batches = losses.batches(examples, self.args.per_device_eval_batch_size, tokenizer.pad_token_id)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = range(rank, len(batches), world)
        sums = torch.zeros(4, dtype=torch.float64)
        with self.accelerator.autocast():
            for number in mine:
                sums += losses.sums(model, [batches[number]])
            if len(mine) < math.ceil(len(batches) / world):
                losses.sums(model, [batches[0]])
        sharding.reshard(model)  # WeightChanges compares the stored weights, not gathered ones
        return losses.from_sums(self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu())


def make_trainer(inputs: Inputs, setup: Setup, more: Mapping[str, Any]) -> _Trainer:
    """Make the trainer. `more` holds further arguments for transformers' TrainingArguments."""
    tokens = TokenCount()
    tokenizer: Any = inputs.tokenizer  # TRL's parameter has another type than our protocol
    inputs.model.config.bos_token_id = tokenizer.bos_token_id  # otherwise the trainer sets it, with a warning
    # These callbacks are the last, because they mark checkpoints as complete. Others may add files to checkpoints.
    own = make_callbacks(
        setup.settings, directory=setup.directory, stage=setup.stage, sharding=setup.sharding, tokens=tokens
    )
    (stops,) = (each for each in own if isinstance(each, preemption.Preemption))
    with _setting_errors(setup):
        trainer = _Trainer(
            model=inputs.model,
            args=_make_arguments(setup, more),
            train_dataset=_pack(inputs.splits, setup.stage) if setup.settings.packing else inputs.splits.train,
            eval_dataset=inputs.splits.validation,
            processing_class=tokenizer,
            callbacks=[*inputs.callbacks, *own],
        )
        trainer.get_optimizer_cls_and_kwargs(trainer.args, inputs.model)  # raises if the optimizer's package is missing
    strategy = sharding.STRATEGIES[setup.sharding]
    strategy.correct(trainer.accelerator)
    strategy.set_gathers(inputs.model, setup.settings)
    trainer.remove_callback(PrinterCallback)
    trainer.tokens, trainer.preemption, trainer.weight_changes = tokens, stops, inputs.weight_changes
    if inputs.rounded is not None:
        trainer.add_callback(ForgetRounded(inputs.rounded))
    if inputs.teacher is not None:
        trainer.learn_from(inputs.teacher, strategy)
    return trainer


@contextmanager
def no_triton_kernels() -> Iterator[None]:
    """Inside the block, TRL's loss does not run its Triton kernels, and their results stay empty.

    This is only for fake tensors, which have no values. trl 1.16 has no setting that switches the kernels off.
    """
    from trl.kernels import chunked_logprob

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **__: None

    fakes: dict[str, Any] = {
        "_forward_kernel": Kernel(),
        "_backward_kernel": Kernel(),
        "_use_triton": lambda device: True,
        "triton": SimpleNamespace(cdiv=lambda count, size: -(-count // size)),  # missing from CPU builds of torch
    }
    with patch.multiple(chunked_logprob, create=True, **fakes):
        yield


@contextmanager
def _setting_errors(setup: Setup) -> Iterator[None]:
    """Inside the block, raise UserError if transformers or TRL refuses a setting."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{setup.stage}.optimizer={setup.settings.optimizer}: {error}") from error
    except ValueError as error:
        raise UserError(f"training settings: {error}") from error


def _pack(splits: Splits, stage: str) -> Dataset:
    """Pack whole examples into rows of up to `max_length` tokens.

    For each row, the column seq_lengths lists the lengths of its examples.
    """
    with tables.no_progress_bars():
        examples = splits.train.select_columns(["input_ids", "labels"])
        rows: Any = pack_dataset(examples, splits.max_length, _WHOLE_EXAMPLES)
    say(stage, f"packed {len(splits.train)} examples into {len(rows)} rows of up to {splits.max_length} tokens")
    return rows


def _make_arguments(setup: Setup, more: Mapping[str, Any]) -> SFTConfig:
    settings, on_gpu = setup.settings, torch.cuda.is_available()
    # Batches are copied while the GPU computes.
    accelerator = {"non_blocking": on_gpu, **more.get("accelerator_config", {})}
    return SFTConfig(
        output_dir=str(setup.directory / CHECKPOINTS_DIR),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim=settings.optimizer,
        optim_args="bf16_stochastic_round=True" if settings.stochastic_rounding else None,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision is Precision.mixed_bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        logging_steps=settings.logging_steps,
        eval_steps=settings.eval_steps,
        save_steps=settings.save_steps,
        load_best_model_at_end=settings.keep_best,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        dataset_kwargs={"skip_prepare_dataset": True},  # the data is already tokenized and packed
        packing=settings.packing,
        **_FIXED,
        **{**more, "accelerator_config": accelerator},
    )


def _warn_of_lost_updates(model: nn.Module, setup: Setup) -> None:
    rate, stage = setup.settings.learning_rate, setup.stage
    # Under mixed precision, weights may be BF16 too, but then the optimizer has FP32 copies.
    is_bf16 = setup.settings.precision is Precision.bf16
    trained_in_bf16 = is_bf16 and any(p.requires_grad and p.dtype is torch.bfloat16 for p in model.parameters())
    is_lost = trained_in_bf16 and not setup.settings.stochastic_rounding
    if is_lost and rate < _LOWEST_SAFE_BF16_RATE:
        warn(
            stage,
            f"{stage}.precision=bf16 at {stage}.learning_rate={rate}: most updates are smaller than"
            " half a BF16 step and are lost (69 % at 2e-5, 84 % at 1e-5). Use mixed_bf16,"
            f" or {stage}.stochastic_rounding=true, or expect that few weights change.",
        )
