"""Make callbacks for metrics, progress, checkpoints, the best weights and early stopping.

Legend: B = examples, T = tokens, L = layers, E = experts.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.trainer_utils import rotate_checkpoints

from pipeline.config import Sharding, TrainConfig
from pipeline.data.harmony import IGNORED
from pipeline.models.rounded_weights import RoundedWeights
from pipeline.runs.console import progress, say, warn
from pipeline.runs.metrics import read_metrics
from pipeline.runs.processes import is_main_process, wait_for_everyone
from pipeline.runs.provenance import peak_resident_bytes
from pipeline.runs.tracking import log_metrics
from pipeline.training.preemption import Preemption
from pipeline.training.resume import mark_complete
from pipeline.training.symptoms import ROUTED, UNUSED

_LOSS = "eval_loss"
_RECOUNTED = "num_tokens"  # TRL's token count, which restarts at zero when a run is resumed


def make_callbacks(
    settings: TrainConfig, *, directory: Path, stage: str, sharding: Sharding, tokens: "TokenCount"
) -> list[TrainerCallback]:
    """Make the callbacks of one training stage.

    Args:
        settings: section `sft` or `qat` of the configuration.
        directory: directory of the stage.
        stage: name of the stage, for messages.
        sharding: how the model is sharded.
        tokens: counter of the tokens in training batches.
    """
    made: list[TrainerCallback] = [
        Metrics(directory, stage, tokens),
        Checkpoints(settings.save_total_limit, directory, stage, sharding),
        Preemption(),
    ]
    if settings.early_stopping_patience is not None:
        made.append(EarlyStopping(settings.early_stopping_patience))
    return made


class Metrics(TrainerCallback):
    """Writes the trainer's logs, throughput, memory use and router load to metrics.jsonl, and shows progress."""

    def __init__(self, directory: Path, stage: str, tokens: "TokenCount") -> None:
        self._directory = directory
        self._tokens = tokens
        self._progress = _Progress(stage)
        self._seconds = 0.0  # duration of the steps since the last line of metrics, without evaluations and checkpoints
        self._started = 0.0

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: object,
    ) -> None:
        assert model is not None
        self._routers = _RouterLoad(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._progress.begin(state)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self._progress.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        # This runs on every process, because counts are summed over all processes.
        assert logs is not None
        if "loss" in logs:
            line = {name: value for name, value in logs.items() if name != _RECOUNTED} | self._throughput()
        elif _LOSS in logs:
            # TRL adds averages over training steps to evaluation logs. They are dropped.
            line = {name: value for name, value in logs.items() if name.startswith("eval_") or name == "epoch"}
            line |= self._routers.take()
        else:
            return  # the log at the end has averages over the whole training, which are wrong after a resume
        log_metrics(self._directory, {"step": state.global_step, **line})
        self._progress.show(state, line)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._progress.end()

    def _throughput(self) -> dict[str, float]:
        tokens, supervised = self._tokens.take()
        seconds, self._seconds = self._seconds, 0.0
        return {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_bytes": torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else peak_resident_bytes(),
        }


class TokenCount:
    """Counts the tokens of training batches, without padding, on the device of the batch."""

    def __init__(self) -> None:
        self._counted: Tensor | None = None  # (2): tokens, supervised tokens

    def add(self, batch: dict[str, Tensor]) -> None:
        """Count the tokens of a batch, from its labels (B, T) and attention_mask (B, T). No mask means no padding."""
        # The first token of an example is never predicted.
        supervised = (batch["labels"][:, 1:] != IGNORED).sum()
        is_real = batch.get("attention_mask")
        tokens = torch.full_like(supervised, batch["labels"].numel()) if is_real is None else is_real.sum()
        counts = torch.stack([tokens, supervised])
        self._counted = counts if self._counted is None else self._counted + counts

    def take(self) -> tuple[int, int]:
        """Return the numbers of tokens and of supervised tokens since the last call, over all processes."""
        assert self._counted is not None
        tokens, supervised = reduce(self._counted, "sum").tolist()
        self._counted = None
        return tokens, supervised


class _RouterLoad:
    """Measures how evenly the routers distribute the tokens of an evaluation over the experts.

    With several processes, some validation examples are repeated so that all processes run the same number of batches.
    Repeated examples count twice. Training batches are not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._is_real: Tensor | None = None  # (B T): 1 at tokens of the current batch, 0 at padding
        self._counted: Tensor | None = None  # (L, E): tokens sent to each expert
        routers = [module for module in model.modules() if isinstance(module, GptOssTopKRouter)]
        self._shape = (len(routers), routers[0].num_experts)
        self._active = routers[0].top_k
        model.register_forward_pre_hook(self._remember_padding, with_kwargs=True)
        model.register_forward_hook(self._forget_padding)
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._count, layer))

    def _remember_padding(self, model: nn.Module, _: object, inputs: Mapping[str, object]) -> None:
        # A forward pass with a cache generates samples and is not an evaluation.
        if not model.training and not inputs.get("use_cache"):
            mask = inputs["attention_mask"]
            assert isinstance(mask, Tensor)
            self._is_real = mask.flatten()

    def _forget_padding(self, *_: object) -> None:
        self._is_real = None

    def _count(self, layer: int, router: nn.Module, _: object, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if router.training or self._is_real is None:
            return
        experts = outputs[2]  # (B T, experts per token)
        if self._counted is None:
            self._counted = torch.zeros(self._shape, dtype=torch.int64, device=experts.device)
        each = self._is_real.to(torch.int64)[:, None].expand_as(experts)
        self._counted[layer].scatter_add_(0, experts.flatten(), each.flatten())

    def take(self) -> dict[str, float]:
        """Return the router load of each layer since the last call, over all processes.

        Each expert gets a share of the tokens. `router_variation` is the standard deviation of these shares, divided by
        their mean. It is 0 if the shares are equal. `router_largest` is the largest share. If the shares are equal, it
        is (experts per token) / experts. If one expert gets every token, it is 1. The figures of `symptoms` count the
        experts without tokens.
        """
        assert self._counted is not None
        counts = reduce(self._counted, "sum").double().cpu()
        self._counted = None
        shares = counts * self._active / counts.sum(1, keepdim=True)
        variation = shares.std(1, correction=0) / shares.mean(1)
        found = {f"router_variation/layer_{layer}": float(value) for layer, value in enumerate(variation)}
        found |= {f"router_largest/layer_{layer}": float(value) for layer, value in enumerate(shares.amax(1))}
        return found | {UNUSED: int((counts == 0).sum()), ROUTED: float(counts.mean())}


class _Progress:
    """Shows a progress bar on a terminal. Without a terminal, it prints a message for each line of metrics."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._first_step = 0
        self._started = 0.0
        self._bar: Any = None

    def begin(self, state: TrainerState) -> None:
        self._first_step = state.global_step
        self._started = time.monotonic()
        self._bar = progress(total=state.max_steps, what=f"[{self._stage}]", unit="step", done=state.global_step)

    def step(self) -> None:
        self._bar.update()

    def show(self, state: TrainerState, line: Mapping[str, float]) -> None:
        if _LOSS in line:
            say(self._stage, f"step {state.global_step}: validation loss {line[_LOSS]:.4f}")
            return
        shown = f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s"
        if self._bar.disable:
            say(self._stage, f"step {state.global_step} of {state.max_steps}: {shown}, {self._time_left(state)} left")
        else:
            self._bar.set_postfix_str(shown)

    def end(self) -> None:
        self._bar.close()

    def _time_left(self, state: TrainerState) -> str:
        """Estimate the time until the last step as h:mm:ss, at the average speed so far."""
        per_step = (time.monotonic() - self._started) / (state.global_step - self._first_step)
        seconds = round(per_step * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class Checkpoints(TrainerCallback):
    """Marks checkpoints as complete, removes old ones, and makes the trainer end with the best weights.

    With `load_best_model_at_end` the trainer loads `state.best_model_checkpoint` after the last step.
    """

    def __init__(self, limit: int, directory: Path, stage: str, sharding: Sharding) -> None:
        self._limit = limit
        self._directory = directory
        self._stage = stage
        self._sharding = sharding

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.best_global_step:  # the run may have been moved since the checkpoint stored this path
            state.best_model_checkpoint = str(_checkpoint_path(args, state.best_global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            # transformers 5.14 would save a checkpoint now. A resume from it would take one step too many.
            control.should_save = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        assert metrics is not None
        is_best = state.best_metric is None or metrics[_LOSS] < state.best_metric
        if state.global_step >= state.max_steps and is_best:
            state.best_model_checkpoint = None  # the last step has no checkpoint, but its weights are in the model

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        wait_for_everyone()
        if state.is_world_process_zero:
            mark_complete(_checkpoint_path(args, state.global_step), self._sharding)
            # Remove old checkpoints only now. A resume needs one of them until the new checkpoint is complete.
            rotate_checkpoints(str(args.output_dir), self._limit, state.best_model_checkpoint)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not args.load_best_model_at_end or state.best_metric is None or not is_main_process():
            return
        if state.global_step < state.max_steps:
            say(self._stage, f"stopped early, at step {state.global_step} of {state.max_steps}")
        if state.best_global_step != state.global_step:
            say(self._stage, f"keeping step {state.best_global_step}: validation loss {state.best_metric:.4f}")
        before = next(line[_LOSS] for line in read_metrics(self._directory) if _LOSS in line)
        if state.best_metric >= before:
            warn(
                self._stage,
                f"no step had a lower validation loss than the model before training ({before:.4f});"
                " keeping the best step",
            )


class EarlyStopping(EarlyStoppingCallback):
    """Stops training early, with transformers' own callback.

    The callback counts the evaluations without improvement, and checkpoints store this count.
    """

    # EarlyStoppingCallback has a parameter `metrics`. In TrainerCallback, it is part of **kwargs. So the types differ.
    def on_evaluate(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **others: object,
    ) -> None:
        super().on_evaluate(args, state, control, metrics, **others)
        if control.should_training_stop:
            control.should_log = True
            # A run that is resumed from a checkpoint of this step would train further. A run that is resumed from an
            # earlier checkpoint stops at this step again.
            control.should_save = False


def _checkpoint_path(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{step}"


class ForgetRounded(TrainerCallback):
    """Empties the cache of rounded weights when a checkpoint is loaded and after each step of the optimizer.

    Before each step, it stops training if a rounded value was NaN or Inf.
    """

    def __init__(self, rounded: RoundedWeights) -> None:
        """Store the cache that this callback empties."""
        self._rounded = rounded

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._rounded.forget()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._rounded.non_finite.raise_if_any()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._rounded.forget()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._rounded.non_finite.raise_if_any()  # the last validation has rounded values too
        self._rounded.forget()
