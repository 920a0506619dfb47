"""One `train` for SFT and QAT: TRL's trainer on our tokens, our validation loss, checkpoints that are whole.

The only importer of trl. The model comes in ready, with adapters and quantizers; QAT differs from SFT in nothing here.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pipeline import losses, sharding
from pipeline.artifacts import CHECKPOINTS_DIR, write_json
from pipeline.config import Precision, Sharding, TrainConfig
from pipeline.data import Splits
from pipeline.errors import UserError
from pipeline.losses import Loss
from pipeline.numerics.codec import CodecError
from pipeline.rounding import RoundedWeights
from pipeline.tracking import (
    forget_metrics_after,
    is_main_process,
    log_metrics,
    read_metrics,
    say,
    shows_progress,
    wait_for_everyone,
    warn,
)

_WHOLE = "whole"  # this file in a checkpoint says that all of it was written, and under which circumstances
_LOWEST_SAFE_BF16_RATE = 1e-4


def train(
    model: Any,
    tokenizer: Any,
    splits: Splits,
    settings: TrainConfig,
    directory: Path,
    stage: str,
    shared: Sharding,
    rounded: RoundedWeights | None = None,
) -> dict[str, Any]:
    """Train in place, going on from the last whole checkpoint in `directory` if there is one.

    Args:
        model: in training precision, with whatever adapters and quantizers it is to have.
        tokenizer: of the model.
        splits: tokenized examples.
        settings: `sft` or `qat` of the configuration.
        directory: of the stage; checkpoints and metrics.jsonl go there.
        stage: its name, for messages.
        shared: how the processes share the model.
        rounded: what is kept of the model's rounded weights, to be forgotten when they change.

    Returns:
        Steps, training loss, validation loss before and after, tokens seen.

    Raises:
        UserError: a setting that transformers refuses.
    """
    model.config.bos_token_id = tokenizer.bos_token_id  # the trainer would do it, with a warning
    _warn_of_lost_updates(model, settings, stage)
    checkpoint = _last_whole_checkpoint(directory / CHECKPOINTS_DIR, stage, shared)
    with sharding.switched_on(shared) as switches:
        arguments = _arguments(settings, directory, stage, eval_on_start=checkpoint is None, **switches)
        trainer = _trainer(model, tokenizer, splits, arguments, _Log(directory, stage, shared))
        if rounded is not None:
            trainer.add_callback(_Forget(rounded))
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else -1
        forget_metrics_after(directory, step)
        if checkpoint is not None:
            say(stage, f"going on from step {step}")
        try:
            with _deterministic_on_cpu():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except CodecError as error:
            raise _diverged(settings, stage, str(error)) from error
        if trainer.evaluated_step != trainer.state.global_step:
            trainer.evaluate()
    sharding.let_go(model)
    wait_for_everyone()  # the main process has written all its metrics
    return {"steps": trainer.state.global_step, **_outcome(directory, settings, stage), **splits.counts}


@contextmanager
def _deterministic_on_cpu() -> Iterator[None]:
    """On a CPU the deterministic kernels cost nothing, and an interrupted run ends with the bits of a whole one."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or not torch.cuda.is_available())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _outcome(directory: Path, settings: TrainConfig, stage: str) -> dict[str, float]:
    """First and last figures of metrics.jsonl, which survives interruptions (the trainer's own averages do not)."""
    lines = read_metrics(directory)
    validation = [line["eval_loss"] for line in lines if "eval_loss" in line]
    training = [line["loss"] for line in lines if "loss" in line]
    if not all(math.isfinite(loss) for loss in (*validation, *training)):
        raise _diverged(settings, stage, "the loss is not finite")
    return {
        "train_loss_first": training[0],
        "train_loss_last": training[-1],
        "validation_loss_before": validation[0],
        "validation_loss": validation[-1],
    }


def _diverged(settings: TrainConfig, stage: str, reason: str) -> UserError:
    return UserError(f"{stage}.learning_rate={settings.learning_rate}: training diverged ({reason}). Lower it.")


class _Trainer(SFTTrainer):
    """TRL's trainer with our validation loss.

    Overridden because transformers 5.14 averages validation loss over batches, so that it depends on the batch size and
    differs from what `evaluate` reports; there is no public hook for a token-weighted mean.
    """

    evaluated_step: int | None = None

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        loss = self._validation_loss()
        metrics = {
            f"{metric_key_prefix}_loss": loss.supervised,
            f"{metric_key_prefix}_loss_all_tokens": loss.over_all,
            f"{metric_key_prefix}_perplexity": loss.perplexity,
        }
        self.log(metrics)
        self.evaluated_step = self.state.global_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_loss(self) -> Loss:
        """Every process takes every n-th batch; all take part in as many, for the sake of sharded models."""
        tokenizer: Any = self.processing_class
        batches = losses.batches(self.eval_dataset, self.args.per_device_eval_batch_size, tokenizer.pad_token_id)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = batches[rank::world]
        sums = torch.zeros(4, dtype=torch.float64)
        with self.accelerator.autocast():
            for batch in mine:
                sums += losses.sums(self.model, [batch])
            if len(mine) < math.ceil(len(batches) / world):
                losses.sums(self.model, batches[:1])
        return losses.from_sums(self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu())


class _Log(TrainerCallback):
    """Writes what the trainer logs to metrics.jsonl, and marks checkpoints as whole."""

    def __init__(self, directory: Path, stage: str, shared: Sharding) -> None:
        self._directory = directory
        self._stage = stage
        self._shared = shared

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            log_metrics(self._directory, {"step": state.global_step, **logs})
            if "eval_loss" in logs:
                say(self._stage, f"step {state.global_step}: validation loss {logs['eval_loss']:.4f}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            # transformers 5.14 would save now, and take one step too many when it resumes from there.
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_everyone()
        if state.is_world_process_zero:
            whole = Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE
            write_json(whole, _circumstances(self._shared))


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


def _trainer(model: Any, tokenizer: Any, splits: Splits, arguments: SFTConfig, log: _Log) -> _Trainer:
    try:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=splits.train,
            eval_dataset=splits.validation,
            processing_class=tokenizer,
            callbacks=[log],
        )
        trainer.remove_callback(PrinterCallback)
    except ValueError as error:
        raise UserError(f"training settings: {error}") from error
    return trainer


def _raise_if_launched_otherwise(arguments: SFTConfig, settings: TrainConfig, stage: str) -> None:
    """`accelerate launch` passes its own configuration by the environment, and the trainer takes it up silently."""
    wanted = "bf16" if settings.precision is Precision.mixed_bf16 else "no"
    if arguments.mixed_precision != wanted:
        raise UserError(
            f"{stage}.precision={settings.precision.name} means mixed precision {wanted!r}, but the launcher sets"
            f" {arguments.mixed_precision!r}. Use accelerate launch --mixed_precision {wanted}."
        )


def _arguments(settings: TrainConfig, directory: Path, stage: str, **more: Any) -> SFTConfig:
    on_gpu = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(directory / CHECKPOINTS_DIR),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision is Precision.mixed_bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        logging_steps=settings.logging_steps,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        max_length=None,  # cut and counted when the data was prepared
        shuffle_dataset=False,
        packing=False,  # with eager attention packed documents see each other
        report_to="none",
        disable_tqdm=not shows_progress(),
        **more,
    )
    _raise_if_launched_otherwise(arguments, settings, stage)
    return arguments


def _circumstances(shared: Sharding) -> dict[str, Any]:
    """What a checkpoint's files, and the place in the data where it stands, depend on."""
    return {"processes": int(os.environ.get("WORLD_SIZE", "1")), "sharding": shared.name}


def _raise_if_made_otherwise(checkpoint: Path, shared: Sharding, stage: str) -> None:
    before, now = json.loads((checkpoint / _WHOLE).read_text(encoding="utf-8")), _circumstances(shared)
    if before != now:
        raise UserError(
            f"{stage}: {checkpoint} is of {before['processes']} processes with sharding={before['sharding']}; on"
            f" {now['processes']} with sharding={now['sharding']} it would not go on with the same batches."
            " Go on as it was begun, or start anew with overwrite=true."
        )


def _last_whole_checkpoint(directory: Path, stage: str, shared: Sharding) -> Path | None:
    """The newest checkpoint that was written to its end; later, broken ones are removed.

    Raises:
        UserError: it was made by another number of processes, or sharded otherwise.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    whole = [path for path in found if (path / _WHOLE).is_file()]
    wait_for_everyone()
    for path in found:
        if path not in whole and is_main_process():
            say(stage, f"removing {path.name}, which was interrupted while it was written")
            shutil.rmtree(path)
    wait_for_everyone()
    if whole:
        _raise_if_made_otherwise(whole[-1], shared, stage)
    return whole[-1] if whole else None


def _warn_of_lost_updates(model: Any, settings: TrainConfig, stage: str) -> None:
    trained_in_bf16 = any(p.requires_grad and p.dtype is torch.bfloat16 for p in model.parameters())
    if trained_in_bf16 and settings.learning_rate < _LOWEST_SAFE_BF16_RATE:
        warn(
            stage,
            f"{stage}.precision=bf16 at {stage}.learning_rate={settings.learning_rate}: most updates are smaller than"
            " half a BF16 step and are lost (69 % at 2e-5, 84 % at 1e-5). Use mixed_bf16, or expect little to change.",
        )
