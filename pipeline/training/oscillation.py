"""Count weights whose 4-bit values flip back and forth in QAT, and hold them at their mean.

A weight near the threshold between two values of the format can flip at every few steps, because each rounded value
moves it back across the threshold. It then adds noise to training, and the last step decides at random which value the
export gets (Nagel et al. 2022, arXiv:2203.08680). `OscillationCount` counts such weights in a sample. `Holder` stops
them: it sets a weight that oscillates to the mean of its rounded values, and keeps it there. Nagel et al. freeze such
weights at a mean, too. They store an average of the flips. Here the flips in a window of steps are counted, because a
count takes one byte.

Legend: E = experts, in, out = sizes of a projection.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded_files
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS
from pipeline.config import Method, Oscillation, QatConfig, Sharding
from pipeline.models import sharding
from pipeline.models.loading import TRAIN_DTYPES
from pipeline.models.rounded_weights import NonFinite
from pipeline.numerics.codec import fake_quantize, tensor_scale
from pipeline.numerics.formats import BlockFormat
from pipeline.runs.console import say
from pipeline.training.flips import Flips

STATE_DIR = "oscillation"
"""Directory of the holder's state in a checkpoint."""

_FLIPS, _WINDOW = 2, 32  # a weight is held if it crosses its mean so many times in so many optimizer steps
_MANY = 0.01  # share of oscillating codes from which the program gives advice
_SAMPLED, _COLUMNS = slice(0, 1), slice(0, 128)  # experts of each stack, and output dimensions of each expert


class _Rounding:
    """Rounds expert weights as the forward pass does."""

    def __init__(self, block_format: BlockFormat, dtype: torch.dtype) -> None:
        self._format, self._dtype = block_format, dtype
        # The forward pass of the next step finds the same values that are not finite, and raises the error.
        self._unused = NonFinite()

    def __call__(self, weights: Tensor, columns: slice = slice(None)) -> Tensor:
        """Round experts (E, in, out), and return these columns of the result."""
        values = weights.detach().to(self._dtype).transpose(1, 2)
        scale = tensor_scale(values, self._format)
        is_bad = self._unused.flag(values.device)
        return fake_quantize(values[:, columns], self._format, scale, is_bad=is_bad).transpose(1, 2)


class OscillationCount(TrainerCallback):
    """Counts the sampled codes that have gone back and forth since the previous validation.

    A part of the first expert of each trained stack is sampled after each optimizer step, without waiting for the GPU.
    If a stack is sharded, the main process samples its own part. ZeRO-3 empties parameters between steps, so nothing is
    counted.

    Every validation starts a new count. So a resumed run reports the same counts if it resumes at a validation.
    """

    def __init__(self, model: nn.Module, block_format: BlockFormat, dtype: torch.dtype, stage: str) -> None:
        """Store what is needed to sample.

        Args:
            model: the model to train.
            block_format: the format of the export.
            dtype: type of the weights that the forward pass rounds.
            stage: name of the stage, for messages.
        """
        self._model, self._round, self._stage = model, _Rounding(block_format, dtype), stage
        self._flips: dict[str, Flips] = {}
        self._steps = 0  # in the current count
        self._last: tuple[float, int] | None = None  # share and steps of the previous count

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        # Under ZeRO-3, there are none. Stacks that a validation gathers later are not counted either.
        self._flips = {name: _make_flips(weights[:, :, _COLUMNS]) for name, weights in self._sampled()}
        self._start()

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._steps += 1
        for name, weights in self._sampled():
            if name in self._flips:
                self._flips[name].add(self._round(weights, _COLUMNS))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        found = (self._share(), self._steps) if self._steps and self._flips else self._last
        if found is not None and found[0] >= _MANY:
            share, steps = found
            say(
                self._stage,
                f"{share:.1%} of the sampled 4-bit values went back and forth in the last {steps} steps. Such values"
                " make training noisy. A lower qat.learning_rate or qat.oscillation=hold reduces them.",
            )

    def measure(self) -> dict[str, float]:
        """Return `oscillating_codes`, the share of the sampled codes, and start a new count. Before a step: nothing."""
        if not self._steps or not self._flips:
            return {}
        share = self._share()
        self._last = share, self._steps
        self._start()
        return {"oscillating_codes": share}

    @torch.no_grad()
    def _start(self) -> None:
        self._steps = 0
        for name, weights in self._sampled():
            if name in self._flips:
                self._flips[name].start(self._round(weights, _COLUMNS))

    def _share(self) -> float:
        crossed = torch.stack([flips.have_crossed(1).sum() for flips in self._flips.values()]).sum()
        return int(crossed) / sum(flips.crossings.numel() for flips in self._flips.values())

    def _sampled(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in _trained_stacks(self._model):
            weights = sharding.first_part(parameter).detach()[_SAMPLED]
            if weights.numel():
                yield name, weights


class Holder(TrainerCallback):
    """Holds expert weights that oscillate at the mean of their rounded values, until training ends.

    The mean and the crossings are sharded like the weights. Checkpoints contain them, and any number of processes can
    read these. Weights can be held without sharding and with FSDP2. DeepSpeed overwrites held weights with its copies.
    """

    def __init__(self, model: nn.Module, block_format: BlockFormat, dtype: torch.dtype, stage: str) -> None:
        """Store what is needed. The arguments are those of `OscillationCount`."""
        self._model, self._round, self._stage = model, _Rounding(block_format, dtype), stage
        self._flips: dict[str, Flips] = {}

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        for name, parameter in _trained_stacks(self._model):
            self._flips[name] = _make_flips(parameter.detach())
        if state.global_step:
            sharded_files.load(self._saved(), checkpoint_id=_state_dir(args, state))
            return
        for _name, weights, flips in self._own_parts():
            flips.start(self._round(weights))

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        starts_window = state.global_step % _WINDOW == 0  # steps before this one
        for _name, weights, flips in self._own_parts():
            is_held = flips.have_crossed(_FLIPS)
            if starts_window:
                flips.crossings.copy_(torch.where(is_held, flips.crossings, flips.crossings.sign()))
            flips.add(self._round(weights), is_held)
            weights.copy_(torch.where(flips.have_crossed(_FLIPS), flips.mean.to(weights.dtype), weights))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # Other callbacks mark the checkpoint as complete later.
        sharded_files.save(self._saved(), checkpoint_id=_state_dir(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        share = self.measure()["held_weights"]
        say(self._stage, f"qat.oscillation=hold held {share:.2%} of the experts' weights at the last step")

    def measure(self) -> dict[str, float]:
        """Return `held_weights`, the share of the trained expert weights that are held. This is a collective call."""
        counts = torch.zeros(2, dtype=torch.float64, device=_local(next(iter(self._flips.values())).crossings).device)
        for _name, _weights, flips in self._own_parts():
            counts[0] += flips.have_crossed(_FLIPS).sum()
            counts[1] += flips.crossings.numel()
        held, total = reduce(counts, "sum").tolist()
        return {"held_weights": held / total}

    def _own_parts(self) -> Iterator[tuple[str, Tensor, Flips]]:
        """Yield views of this process's weights, a few experts at a time, with their state."""
        for name, parameter in _trained_stacks(self._model):
            own = Flips(*map(_local, self._flips[name]))
            for weights, flips in own.parts(_local(parameter.detach())):
                yield name, weights, flips

    def _saved(self) -> dict[str, Tensor]:
        return {f"{name}.{kind}": part for name, flips in self._flips.items() for kind, part in flips._asdict().items()}


def watch(
    model: nn.Module, qat: QatConfig, block_format: BlockFormat, shared: Sharding
) -> list[OscillationCount | Holder]:
    """Make the callbacks for the settings of QAT. Without training of whole expert stacks, there are none.

    Args:
        model: the model to train.
        qat: settings of QAT.
        block_format: the format of the export.
        shared: how the model is sharded.
    """
    if qat.method is not Method.full:
        return []
    dtype = sharding.saved_dtype(qat, TRAIN_DTYPES[qat.precision], shared)
    count = OscillationCount(model, block_format, dtype, "qat")
    return [Holder(model, block_format, dtype, "qat"), count] if qat.oscillation is Oscillation.hold else [count]


def _make_flips(weights: Tensor) -> Flips:
    return Flips(torch.zeros_like(weights, dtype=torch.bfloat16), torch.zeros_like(weights, dtype=torch.int8))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _trained_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the expert stacks that are trained as a whole, (E, in, out). With adapters, there are none."""
    for name, parameter in model.named_parameters():
        if name.endswith(EXPERT_WEIGHTS) and parameter.requires_grad:
            yield name, parameter


def _state_dir(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_DIR
