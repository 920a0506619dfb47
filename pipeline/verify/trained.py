"""Compares an export with the trained model: weights bit for bit, and logits within a tolerance."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.checkpoints.gpt_oss import expert_projections, other_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.errors import CheckFailed, MachineError
from pipeline.export.layout import View
from pipeline.models import adapters, loading, losses, placement, quantizer_calls
from pipeline.models.adapted_names import parameter_name
from pipeline.models.packed_experts import is_packed
from pipeline.models.references import ModelRef
from pipeline.models.weights import Weights
from pipeline.numerics.codec import same_bits
from pipeline.numerics.formats import MXFP4, BlockFormat
from pipeline.runs.console import progress, warn
from pipeline.verify.check import Check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TrainedModel:
    """The model that was exported. It runs with the same fake quantization as in training.

    If the model was trained without quantizers, or for another format, the codec rounds its weights to the export's
    format. The export must then have these rounded weights.
    """

    def __init__(self, ref: ModelRef, batches: list[dict[str, Tensor]], block_format: BlockFormat) -> None:
        """Load the model with its adapters and quantizers, or with weights that the codec rounded to `block_format`."""
        self.batches = batches
        # Without quantizers there are no calibrated scales for inputs, so only the weights are rounded.
        self.rounded = replace(ref, block_format=replace(block_format, quantizes_activations=False))
        self.runs_quantizers = ref.block_format == block_format
        if not self.runs_quantizers:
            self.model = _load_rounded(self.rounded)
        else:
            placement.raise_if_host_too_small("verify", ref.base, ref.dtype)
            self.model = loading.load_quantized(ref, ref.dtype).eval()
            # A model with adapters stays on the CPU. Export merges the adapters of attention on the CPU, too. On
            # another device, PEFT's merge could give different bits.
            if not ref.adapter:
                self.model = placement.place(self.model)
        self.device = self.model.device

    def check_experts(self, export: View) -> Check:
        """Decode the export's expert weights, and compare them with the fake-quantized weights of the forward pass.

        The comparison is bit for bit.
        """
        check = Check("experts: decoded weights equal those of the forward pass, bit for bit")
        seen: set[tuple[str, int]] = set()

        def see(name: str, trained: Tensor, first: int) -> None:
            for expert in range(first, first + len(trained)):  # one expert at a time, to save memory
                if (name, expert) not in seen:
                    seen.add((name, expert))
                    values = export.values(name, slice(expert, expert + 1))
                    _compare_bits(check, name, values, trained[expert - first].unsqueeze(0), first=expert)

        if self.runs_quantizers:
            with quantizer_calls.watch(self.model, see) as fired:
                losses.measure(self.model, self.batches[:1])
            fired.raise_unless_all(self.model)
        else:
            self._see_rounded(see)
        stacks = {projection.name: projection.experts for projection in expert_projections(export.shape)}
        missing = {name for name, count in stacks.items() if any((name, i) not in seen for i in range(count))}
        check.problems += [f"{name}: the forward pass did not use it" for name in sorted(missing)]
        check.measured["tensors"] = len(stacks) - len(missing)
        return check

    def check_others(self, export: View) -> Check:
        """Compare all tensors except the expert weights with the trained values in BF16, bit for bit.

        The check changes the model: adapters of attention are merged into it, and its weights are rounded. The method
        `check_logits` needs these changes, so call `check_others` first.
        """
        check = Check("other tensors: equal the trained ones in BF16, bit for bit")
        adapters.merge_attention(self.model)
        expected = other_tensors(export.shape)
        found = set()
        for full_name, parameter in self.model.named_parameters():
            name = parameter_name(full_name)
            if name in expected:
                found.add(name)
                parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
                _compare_bits(check, name, export.values(name), parameter.data)
        check.problems += [f"{name}: the trained model has no such tensor" for name in sorted(expected.keys() - found)]
        check.measured["tensors"] = len(found)
        return check

    def check_logits(self, directory: Path, tolerance: float) -> Check:
        """On real text, compare the export's logits in transformers with the fake-quantized model's logits."""
        check = Check(
            "logits: transformers loads the export, and its logits agree with the fake-quantized model's",
            unseen=f"logits on prompts other than the {len(self.batches)} compared",
        )
        # Use the same order of summation as `self.model`. Another order could change a router's choice near a tie.
        # With quantizers, ModelOpt runs plain experts in a loop.
        kernel = "grouped_mm" if is_packed(self.model) else "eager"
        expected = [self._logits(self.model, batch) for batch in self.batches]
        del self.model  # frees memory for the export
        gc.collect()
        try:
            exported = self._load_export(check, directory, kernel)
            nn.Module.to(exported, self.device).eval()  # moves in place; transformers' own `to` has no type annotations
        except (CheckFailed, ValueError, RuntimeError, OSError) as error:
            check.problems.append(f"transformers cannot load the export: {str(error).splitlines()[0]}")
            return check
        largest, agreeing, positions = 0.0, 0, 0
        for batch, want in zip(progress(self.batches, what="logits", unit="batch"), expected, strict=True):
            have = self._logits(exported, batch)
            largest = max(largest, float((have - want).abs().max()))
            agreeing += int((have.argmax(-1) == want.argmax(-1)).sum())
            positions += want.shape[0]
        check.measured = {
            "largest_difference": largest,
            "tolerance": tolerance,
            "top1_agreement": agreeing / positions,
            "positions": positions,
        }
        if not largest <= tolerance:
            check.problems.append(f"logits differ by up to {largest:.3g}, more than {tolerance:.3g}")
        return check

    def _load_export(self, check: Check, directory: Path, kernel: str) -> "PreTrainedModel":
        """Load the export with transformers, which decodes it. If that needs too much memory, keep it packed."""
        dtype = self.rounded.dtype
        try:
            placement.raise_if_host_too_small("verify", directory, dtype, is_decoded=True)
        except MachineError as error:
            if not Checkpoint(directory).is_packed:
                raise
            warn("verify", f"{error} The logits are computed with this program's loader, which keeps experts packed.")
            check.unseen = f"{check.unseen}; whether transformers loads the export"
            return loading.load_packed(directory, dtype)
        return loading.load_plain(directory, dtype, experts_implementation=kernel)

    def _see_rounded(self, see: Callable[[str, Tensor, int], None]) -> None:
        """Call `see` with the rounded weights of some experts at a time, shape (g, out, in), to save memory."""
        weights = Weights(self.rounded)
        for projection in expert_projections(weights.shape):
            for rows in weights.parts(projection.name):
                see(projection.name, weights.read_effective(projection.name, rows).transpose(1, 2), rows.start)

    def check_inputs(self, export: View, calibrated: Callable[[Path], dict[str, Tensor]]) -> Check:
        """Compare the scales of quantized inputs with the calibrated ones."""
        check = Check("inputs: their scales equal the calibrated ones, bit for bit")
        for name, scale in calibrated(self.rounded.directory).items():
            if name in export.files.tensors:
                _compare_bits(check, name, export.files.read(name).reshape(1), scale.reshape(1))
            else:
                check.problems.append(f"{name}: missing, but the inputs were quantized in training")
        return check

    @staticmethod
    @torch.no_grad()
    def _logits(model: "PreTrainedModel", batch: dict[str, Tensor]) -> Tensor:
        """Compute the logits of all positions except padding.

        Return them as float32 on the CPU, shape (positions, vocabulary).
        """
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
        return logits[inputs["attention_mask"].bool()].float().cpu()


def _load_rounded(ref: ModelRef) -> "PreTrainedModel":
    """Load a model with its rounded experts. If that needs too much memory and the format is MXFP4, pack them.

    Raises:
        MachineError: the machine has too little memory.
    """
    try:
        placement.raise_if_host_too_small("verify", ref.base, ref.dtype)
    except MachineError as error:
        if ref.is_packed or ref.block_format is None or ref.block_format.name != MXFP4.name:
            raise
        placement.raise_if_host_too_small("verify", ref.base, ref.dtype, is_packed=True)
        warn("verify", f"{error} The rounded experts are packed in memory instead.")
        return loading.load_rounded_packed(ref, ref.dtype)
    return loading.load_effective(ref, ref.dtype, experts_implementation="eager")


def _compare_bits(check: Check, name: str, have: Tensor, want: Tensor, *, first: int = 0) -> None:
    """Compare two tensors, and add a problem to the check if they differ. `first` is the index of their first row."""
    want = want.detach().cpu()
    if have.shape != want.shape:
        check.problems.append(f"{name}: shape {list(have.shape)}, trained {list(want.shape)}")
        return
    different = 0
    if not same_bits(have, want):  # equal tensors need no copies in float32: 4.6 GB for the embedding of gpt-oss-20b
        want, have = want.float(), have.float()
        different = int((have.view(torch.int32) != want.view(torch.int32)).count_nonzero())
    check.measured["differing_values"] = check.measured.get("differing_values", 0) + different
    check.measured["values"] = check.measured.get("values", 0) + want.numel()
    if different:
        largest = float((have - want).abs().max())
        index = (have != want).nonzero()
        place = [int(index[0][0]) + first, *index[0].tolist()[1:]] if len(index) else []
        where = f", the first at {place}" if place else " (signs of zero)"
        check.problems.append(f"{name}: {different} of {want.numel()} values differ, by up to {largest:.3g}{where}")
