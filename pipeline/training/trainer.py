"""One `train` for SFT and QAT: TRL's trainer on our tokens, our validation loss, checkpoints that are whole.

The only importer of trl. The model comes in ready, with adapters and quantizers; QAT differs from SFT in nothing here.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

from pipeline.config import Precision, Sharding, TrainConfig
from pipeline.data import tables
from pipeline.data.examples import Splits
from pipeline.data.harmony import IGNORED
from pipeline.errors import UserError
from pipeline.models import losses, sharding
from pipeline.models.losses import Loss
from pipeline.models.rounded_weights import RoundedWeights
from pipeline.numerics.codec import CodecError
from pipeline.runs.artifacts import CHECKPOINTS_DIR
from pipeline.runs.console import say, warn
from pipeline.runs.metrics import forget_metrics_after, read_metrics
from pipeline.runs.processes import wait_for_everyone
from pipeline.training import resume
from pipeline.training.callbacks import TokenCount, callbacks
from pipeline.training.distillation import Teacher, distilled
from pipeline.training.weight_changes import Drift

_WHOLE_EXAMPLES = "bfd"  # best fit, decreasing: TRL's way to pack that cuts no example that fits
_LOWEST_SAFE_BF16_RATE = 1e-4


@dataclass(frozen=True)
class Inputs:
    """What a training stage trains, and on what.

    Attributes:
        model: in training precision, with whatever adapters and quantizers it is to have; trained in place.
        tokenizer: of the model.
        splits: tokenized examples.
        drift: measures, at each validation, how far the experts have moved.
        rounded: what is kept of the model's rounded weights, to be forgotten when they change.
        teacher: whose predictions are learnt beside the data, or None.
        looks: callbacks that look at the model at each validation.
    """

    model: Any
    tokenizer: Any
    splits: Splits
    drift: Drift
    rounded: RoundedWeights | None = None
    teacher: Teacher | None = None
    looks: Sequence[TrainerCallback] = ()


@dataclass(frozen=True)
class Setup:
    """How and where a stage trains.

    Attributes:
        settings: `sft` or `qat` of the configuration.
        stage: its name, for messages.
        directory: of the stage; checkpoints and metrics.jsonl go there.
        shared: how the processes share the model.
    """

    settings: TrainConfig
    stage: str
    directory: Path
    shared: Sharding

    def diverged(self, reason: str) -> UserError:
        """The error for a loss or weights that are no numbers any more."""
        rate = f"{self.stage}.learning_rate={self.settings.learning_rate}"
        return UserError(f"{rate}: training diverged ({reason}). Lower it.")


def train(inputs: Inputs, setup: Setup) -> dict[str, Any]:
    """Train in place, going on from the last whole checkpoint of the stage if there is one.

    Returns:
        Steps, the step whose weights are left, training loss, validation loss before and after, tokens seen.

    Raises:
        UserError: a setting that transformers refuses, a launcher or a checkpoint that does not go with the settings.
    """
    _warn_of_lost_updates(inputs.model, setup)
    if sharding.STRATEGIES[setup.shared].hooks_gradients:
        inputs.model.enable_input_require_grads()  # frozen embeddings: else adapters of the first layer alone have them
    checkpoint = resume.last_whole(setup.directory / CHECKPOINTS_DIR, setup.stage, setup.shared)
    with sharding.switch_on(setup.shared) as switches:
        trainer = _trainer(inputs, setup, eval_on_start=checkpoint is None, **switches)
        step = resume.step_of(checkpoint) if checkpoint else -1
        forget_metrics_after(setup.directory, step)
        if checkpoint is not None:
            say(setup.stage, f"going on from step {step}")
        try:
            with _deterministic_on_cpu():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except (CodecError, FloatingPointError) as error:
            raise setup.diverged(str(error)) from error
        if trainer.evaluated_step != trainer.state.global_step:
            trainer.evaluate()
    sharding.reshard(inputs.model)
    wait_for_everyone()  # the main process has written all its metrics
    kept = trainer.state.best_global_step if setup.settings.keep_best else trainer.state.global_step
    return {
        "steps": trainer.state.global_step,
        "kept_step": kept,
        **_outcome(setup, kept),
        **inputs.splits.counts,
    }


@contextmanager
def _deterministic_on_cpu() -> Iterator[None]:
    """On a CPU, let an interrupted run end with the bits of a whole one.

    Torch would also fill all uninitialized memory, which doubles the time of a step and which no bit depends on.
    """
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # a module whose switches are properties
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(before or not torch.cuda.is_available())
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled


def _outcome(setup: Setup, kept: int | None) -> dict[str, float]:
    """Figures of metrics.jsonl, which survives interruptions (the trainer's own averages do not)."""
    lines = read_metrics(setup.directory)
    validation = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    training = [line["loss"] for line in lines if "loss" in line]
    if not all(math.isfinite(loss) for loss in (*validation.values(), *training)):
        raise setup.diverged("the loss is not finite")
    assert kept is not None  # one finite loss is the lowest
    return {
        "train_loss_first": training[0],
        "train_loss_last": training[-1],
        "validation_loss_before": validation[0],
        "validation_loss": validation[kept],
    }


class _Trainer(SFTTrainer):
    """TRL's trainer with our validation loss, and with a teacher if there is one.

    Overridden because transformers 5.14 averages validation loss over batches, so that it depends on the batch size and
    differs from what `evaluate` reports; there is no public hook for a token-weighted mean.
    """

    drift: Drift
    tokens: TokenCount
    evaluated_step: int | None = None
    _teacher: Teacher | None = None
    _loss_of_step = torch.zeros(())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Overridden to end at the first step whose loss is not finite, on every process, and before weights change."""
        loss = super().training_step(*args, **kwargs)
        if self._teacher is not None:
            sharding.reshard(self._teacher.model)  # only now: its head was needed once more in the backward pass
        self._loss_of_step = self._loss_of_step + loss.detach()
        if self.accelerator.sync_gradients:
            total = self.accelerator.reduce(self._loss_of_step, "sum")
            self._loss_of_step = torch.zeros(())
            if not total.isfinite():
                raise FloatingPointError(f"the loss of step {self.state.global_step + 1} is not finite")
        return loss

    def learn_from(self, teacher: Teacher, shared: Sharding) -> None:
        """Distil from now on; the teacher is spread over the processes as the model is."""
        model = sharding.STRATEGIES[shared].shard_frozen(self.accelerator, teacher.model.requires_grad_(False))
        model.eval()  # which DeepSpeed's does not return
        self._teacher = replace(teacher, model=model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Overridden to count tokens, and for the teacher: TRL's `compute_loss_func` does not see the inputs for it."""
        self.tokens.add(inputs)
        if self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            found = distilled(model, self._teacher, inputs)
        mine = (inputs["labels"][:, 1:] != IGNORED).sum()
        self._metrics["train"]["teacher_divergence"].append((found.divergence / mine.clamp(min=1)).item())
        if num_items_in_batch is None:
            return found.loss / mine.clamp(min=1)
        return found.loss / num_items_in_batch * self.accelerator.num_processes

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        loss = self._validation_loss()
        metrics = {
            f"{metric_key_prefix}_loss": loss.supervised,
            f"{metric_key_prefix}_loss_all_tokens": loss.over_all,
            f"{metric_key_prefix}_perplexity": loss.perplexity,
            **{f"{metric_key_prefix}_{name}": share for name, share in self.drift.figures().items()},
        }
        self.log(metrics)
        self.evaluated_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self) -> Loss:
        """Every process takes every n-th batch; all take part in as many, for the sake of sharded models."""
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
        return losses.from_sums(self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu())


class _Forget(TrainerCallback):
    """Weights change when a checkpoint is loaded and when the optimizer has made a step."""

    def __init__(self, rounded: RoundedWeights) -> None:
        self._rounded = rounded

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._rounded.forget()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._rounded.forget()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._rounded.forget()


def _trainer(inputs: Inputs, setup: Setup, **more: Any) -> _Trainer:
    inputs.model.config.bos_token_id = inputs.tokenizer.bos_token_id  # the trainer would do it, with a warning
    try:
        tokens, is_packed = TokenCount(), setup.settings.packing
        trainer = _Trainer(
            model=inputs.model,
            args=_arguments(setup, **more),
            train_dataset=_packed(inputs.splits, setup.stage) if is_packed else inputs.splits.train,
            eval_dataset=inputs.splits.validation,
            processing_class=inputs.tokenizer,
            callbacks=callbacks(setup.settings, setup.directory, setup.stage, setup.shared, tokens),
        )
        trainer.get_optimizer_cls_and_kwargs(trainer.args, inputs.model)  # imports the package that has the optimizer
    except ImportError as error:
        raise UserError(f"{setup.stage}.optimizer={setup.settings.optimizer}: {error}") from error
    except ValueError as error:
        raise UserError(f"training settings: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.tokens = tokens
    trainer.drift = inputs.drift
    for look in inputs.looks:
        trainer.add_callback(look)
    if inputs.rounded is not None:
        trainer.add_callback(_Forget(inputs.rounded))
    if inputs.teacher is not None:
        trainer.learn_from(inputs.teacher, setup.shared)
    return trainer


def _packed(splits: Splits, stage: str) -> Dataset:
    """Rows filled up to `max_length` with whole examples, whose lengths are in a column of their own, seq_lengths."""
    with tables.no_progress_bars():
        rows: Any = pack_dataset(
            splits.train.select_columns(["input_ids", "labels"]), splits.max_length, _WHOLE_EXAMPLES
        )
    say(stage, f"packed {len(splits.train)} examples into {len(rows)} rows of up to {splits.max_length} tokens")
    return rows


def _raise_if_launched_otherwise(arguments: SFTConfig, setup: Setup) -> None:
    """`accelerate launch` passes its own configuration by the environment, and the trainer takes it up silently."""
    precision = setup.settings.precision
    wanted = "bf16" if precision is Precision.mixed_bf16 else "no"
    if arguments.mixed_precision != wanted:
        raise UserError(
            f"{setup.stage}.precision={precision.name} means mixed precision {wanted!r}, but the launcher sets"
            f" {arguments.mixed_precision!r}. Use accelerate launch --mixed_precision {wanted}."
        )


def _arguments(setup: Setup, **more: Any) -> SFTConfig:
    settings, on_gpu = setup.settings, torch.cuda.is_available()
    arguments = SFTConfig(
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
        logging_nan_inf_filter=False,  # would log the mean of earlier losses in place of one that is not finite
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        load_best_model_at_end=settings.keep_best,
        restore_callback_states_from_checkpoint=True,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,  # every step uses all of them: a layer's experts are one parameter
        max_length=None,  # cut and counted when the data was prepared
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenized, and packed, already
        packing=settings.packing,
        packing_strategy=_WHOLE_EXAMPLES,
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    _raise_if_launched_otherwise(arguments, setup)
    return arguments


def _warn_of_lost_updates(model: Any, setup: Setup) -> None:
    rate, stage = setup.settings.learning_rate, setup.stage
    trained_in_bf16 = any(p.requires_grad and p.dtype is torch.bfloat16 for p in model.parameters())
    is_lost = trained_in_bf16 and not setup.settings.stochastic_rounding
    if is_lost and rate < _LOWEST_SAFE_BF16_RATE:
        warn(
            stage,
            f"{stage}.precision=bf16 at {stage}.learning_rate={rate}: most updates are smaller than"
            " half a BF16 step and are lost (69 % at 2e-5, 84 % at 1e-5). Use mixed_bf16,"
            f" or {stage}.stochastic_rounding=true, or expect little to change.",
        )
