"""The proof that an export is right: its bits against the trained model's, its layout against the base model's.

Engines load many wrong checkpoints without a word, so nothing here trusts the code that wrote the export: MXFP4 is
decoded by transformers' own routine, the trained values are those that the fake-quantized model's forward pass really
used, and adapters are merged by PEFT.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from pipeline import adapters, losses, models, quantizer
from pipeline.checkpoints import CONFIG, Checkpoint, read_config, side_files
from pipeline.errors import CheckFailed, UserError
from pipeline.export.mxfp4 import released_config
from pipeline.gpt_oss import expert_projections, other_tensors
from pipeline.models import ModelRef, Weights
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import E8M0_NAN, BlockFormat
from pipeline.shards import STEP_BYTES
from pipeline.tracking import progress

_UNIMPORTANT_KEYS = ("transformers_version", "_name_or_path")


@dataclass
class Check:
    """One part of the proof.

    Attributes:
        title: what was compared.
        problems: what is wrong; empty when it passed.
        measured: figures, passed or not.
        skipped: why it could not be checked, or None.
    """

    title: str
    problems: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def status(self) -> str:
        """ok, FAILED or not checked."""
        if self.problems:
            return "FAILED"
        return "not checked" if self.skipped else "ok"


def check_layout(directory: Path, base: Path) -> Check:
    """Names, shapes, types, configuration and side files of an export against those of the base checkpoint."""
    check = Check("layout: names, shapes, types, configuration, tokenizer")
    try:
        export = Checkpoint(directory)
    except UserError as error:
        check.problems.append(str(error))
        return check
    if not export.is_packed:
        check.problems.append(f"{directory}: experts are stored as BF16, not as MXFP4 blocks and scales")
    reference = Checkpoint(base)
    if export.shape != reference.shape:
        check.problems.append(f"{directory / CONFIG}: sizes {export.shape} differ from the base model's")
    check.problems += _config_problems(directory, base) + _side_file_problems(directory, base)
    check.measured = {"tensors": len(export.tensors), "weight_bytes": export.weight_bytes}
    return check


def check_scales(directory: Path) -> Check:
    """No scale of an export is NaN."""
    check = Check("scales: no NaN")
    export = Checkpoint(directory)
    for projection in expert_projections(export.shape):
        nan = export.read(projection.scales) == E8M0_NAN
        if bool(nan.any()):
            check.problems.append(f"{projection.scales}: {int(nan.sum())} scales are NaN (byte 255)")
    return check


def check_copied(directory: Path, base: Path, names: list[str]) -> Check:
    """Tensors that the export says are the source's own: the hash of their stored bytes, read again from both."""
    check = Check("untouched tensors: the source's own bytes, by hash")
    export, reference = Checkpoint(directory), Checkpoint(base)
    for name in progress(names, what="untouched", unit="tensor"):
        if name not in export.tensors or name not in reference.tensors:
            check.problems.append(f"{name}: said to be the source's own, but is not in both checkpoints")
        elif _digest(export, name) != _digest(reference, name):
            check.problems.append(f"{name}: its bytes are not the source's")
    check.measured["tensors"] = len(names)
    return check


def _digest(checkpoint: Checkpoint, name: str) -> str:
    """XXH3-128 of a tensor's stored bytes, a part at a time."""
    info, digest = checkpoint.tensors[name], xxhash.xxh3_128()
    rows = max(1, STEP_BYTES // max(1, info.bytes // info.shape[0]))
    for start in range(0, info.shape[0], rows):
        part = checkpoint.read(name, slice(start, start + rows))
        digest.update(part.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TrainedModel:
    """The model that an export was made from, running as it ran in training.

    A model without quantizers did not round its weights; what the export must hold is what they round to.
    """

    def __init__(self, ref: ModelRef, batches: list[dict[str, Tensor]], block_format: BlockFormat) -> None:
        """Load it: with adapters and quantizers, or with its weights rounded to the export's format by the codec."""
        self.ref = ref
        self.batches = batches
        self.block_format = block_format
        if ref.block_format is None:
            rounded = replace(ref, block_format=block_format)
            self.model = models.load_effective(rounded, ref.dtype, experts_implementation="eager")
        else:
            self.model = models.load_quantized(ref, ref.dtype).eval()
            if not ref.adapter:  # export merges on the CPU, and another device's matrix product may round differently
                self.model = models.place(self.model)
        self.device = self.model.device

    def check_experts(self, directory: Path) -> Check:
        """Decoded expert weights against the fake-quantized ones of the forward pass, bit for bit."""
        check = Check("experts: decoded weights equal those that the forward pass used, bit for bit")
        export = Checkpoint(directory)
        seen: set[str] = set()

        def see(name: str, trained: Tensor) -> None:
            if name not in seen:
                seen.add(name)
                _compare_bits(check, name, _decoded(export, name), trained)

        if self.ref.block_format is not None:
            with quantizer.watch(self.model, see) as fired:
                losses.measure(self.model, self.batches[:1])
            fired.raise_unless_all(self.model)
        else:
            self._see_rounded(see)
        missing = {projection.name for projection in expert_projections(export.shape)} - seen
        check.problems += [f"{name}: the forward pass did not use it" for name in sorted(missing)]
        check.measured["tensors"] = len(seen)
        return check

    def check_others(self, directory: Path) -> Check:
        """Everything but the expert weights against the trained values, rounded to BF16, bit for bit.

        Merges the adapters of attention into the model and rounds it: `check_logits` needs it so.
        """
        check = Check("other tensors: equal the trained ones in BF16, bit for bit")
        export = Checkpoint(directory)
        adapters.merge_attention(self.model)
        expected = other_tensors(export.shape)
        found = set()
        for full_name, parameter in self.model.named_parameters():
            name = adapters.parameter_name(full_name)
            if name in expected:
                found.add(name)
                parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
                _compare_bits(check, name, export.read(name), parameter.data.to(torch.bfloat16))
        check.problems += [f"{name}: the trained model has no such tensor" for name in sorted(expected.keys() - found)]
        check.measured["tensors"] = len(found)
        return check

    def check_logits(self, directory: Path, tolerance: float) -> Check:
        """Logits of the export, loaded by transformers, against those of the fake-quantized model, on real text."""
        check = Check("logits: transformers loads it, and computes what the fake-quantized model computes")
        expected = [self._logits(self.model, batch) for batch in self.batches]
        self.model = None  # frees its memory for the export
        gc.collect()
        try:
            # ModelOpt runs experts one by one; another order of sums can flip a router's near-tie.
            exported = models.load_plain(directory, self.ref.dtype, experts_implementation="eager")
            exported = exported.to(self.device).eval()
        except (CheckFailed, ValueError, RuntimeError, OSError) as error:
            check.problems.append(f"transformers cannot load it: {str(error).splitlines()[0]}")
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

    def _see_rounded(self, see: Callable[[str, Tensor], None]) -> None:
        """A model without quantizers: what its weights round to."""
        weights = Weights(self.ref)
        for projection in expert_projections(weights.shape):
            plain = weights.trained(projection.name)
            see(projection.name, fake_quantize(plain.transpose(1, 2), self.block_format))

    @staticmethod
    @torch.no_grad()
    def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(positions, vocabulary), padding left out, in float32 on the CPU."""
        inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
        logits = model(**inputs, use_cache=False).logits
        return logits[inputs["attention_mask"].bool()].float().cpu()


def _decoded(export: Checkpoint, name: str) -> Tensor:
    """(E, out, in) float32, decoded by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = export.read(f"{name}_blocks"), export.read(f"{name}_scales")
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)


def _compare_bits(check: Check, name: str, have: Tensor, want: Tensor) -> None:
    """Add to the check how far two tensors are apart; any differing bit is a problem."""
    want, have = want.detach().float().cpu(), have.float()
    if have.shape != want.shape:
        check.problems.append(f"{name}: shape {list(have.shape)}, trained {list(want.shape)}")
        return
    different = int((have.contiguous().view(torch.int32) != want.contiguous().view(torch.int32)).sum())
    check.measured["differing_values"] = check.measured.get("differing_values", 0) + different
    check.measured["values"] = check.measured.get("values", 0) + want.numel()
    if different:
        largest = float((have - want).abs().max())
        index = (have != want).nonzero()
        first = f", the first at {index[0].tolist()}" if len(index) else " (signs of zero)"
        check.problems.append(f"{name}: {different} of {want.numel()} values differ, by up to {largest:.3g}{first}")


def _config_problems(directory: Path, base: Path) -> list[str]:
    have, want = read_config(directory), released_config(read_config(base))
    return [
        f"{directory / CONFIG}: {key} is {have.get(key, 'absent')!r}, must be {want.get(key, 'absent')!r}"
        for key in sorted({*have, *want} - set(_UNIMPORTANT_KEYS))
        if have.get(key, "absent") != want.get(key, "absent")
    ]


def _side_file_problems(directory: Path, base: Path) -> list[str]:
    problems = []
    for name in side_files(base):
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: missing; the base model has it")
        elif path.read_bytes() != (base / name).read_bytes():
            problems.append(f"{path}: differs from the base model's")
    return problems
