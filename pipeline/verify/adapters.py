"""Recomputes the merge of adapters that another program saved with PEFT, without the code that export merges with.

Each weight is base + scaling * B A in FP32 (Hu et al., 2021, https://arxiv.org/abs/2106.09685; PEFT's documentation of
`LoraConfig` for rslora, patterns and `target_parameters`). It is computed from adapter_model.safetensors and
adapter_config.json, a part of a tensor at a time.

The merge may round the delta to the type of the factors or of the weight, and it rounds the sum to the type of the
weight. `_Adapters.delta` bounds the error of the delta. Rounding keeps the order of numbers, so a merged value must lie
between base + delta - error and base + delta + error, both rounded. These are mostly the same number. The test holds
for deltas of any size, even if they are too small to change most values of the base.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.config_json import read_config
from pipeline.checkpoints.gpt_oss import EMBEDDING, EXPERT_WEIGHTS, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.models import foreign_adapters, references
from pipeline.models.foreign_adapters import holds_adapters
from pipeline.models.weights import Weights
from pipeline.runs.artifacts import Artifact
from pipeline.runs.records import QuantizeRecord
from pipeline.verify.check import Check

_PREFIX, _INNER = "base_model.model.", ".base_layer"
_FACTOR = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
_ROUNDING = 2.0**-8  # largest relative error of rounding to BF16. FP16 and FP32 have smaller ones.
_NEAR_ZERO = 2.0**-11  # FP16 numbers near 0 have an absolute error, at most this share of the smallest normal number


_TITLE = "adapters: merged weights equal base + scaling * B A, recomputed in FP32 without PEFT"


def check_merge(
    weights: Weights, adapters_in: Path | None = None, on: Path | None = None, *, has_rounded: bool = False
) -> Check:
    """Compare the merged weights of a model with base + scaling * B A. All other weights must be the base model's.

    Args:
        weights: the weights of adapters on their base, as export and the logits use them; or a merged model.
        adapters_in: directory of the adapters, if they are elsewhere than `weights`.
        on: directory of the base model, if it is another one than the base of `weights`.
        has_rounded: whether the experts of a merged model are rounded. They are then not compared.
    """
    check = Check(_TITLE, unseen="the merge of the experts' adapters, because `quantize` rounded the merged weights")
    check.unseen = check.unseen if has_rounded else None
    adapters, base = _Adapters(adapters_in or weights.ref.directory, weights), Checkpoint(on or weights.ref.base)
    for name in plain_tensors(weights.shape):
        if has_rounded and name.endswith(EXPERT_WEIGHTS):
            adapters.skip(name)
            continue
        found = [_compare(weights, base, adapters, name, rows) for rows in weights.parts(name)]
        check.problems += _problems(name, *torch.stack(found).sum(0).tolist(), is_adapted=name in adapters)
    check.problems += [f"{key}: belongs to no weight of the model" for key in sorted(adapters.unused())]
    check.measured = {"tensors": adapters.adapted}
    base.close()
    return check


def check_foreign_sft(quantized: Artifact, fingerprint: str, base: Path) -> Check | None:
    """Check that `quantize` merged the adapters of another program, or gave them to QAT, as `check_merge` computes it.

    Args:
        quantized: the stage `quantize` of the exported model.
        fingerprint: fingerprint of the base model.
        base: directory of the base model.

    Returns:
        The check, or None if the run's SFT is its own.
    """
    record = quantized.read(QuantizeRecord)
    if record.adapters is None:
        return None
    directory = Path(record.adapters)
    if not holds_adapters(directory):
        return Check(_TITLE, skipped=f"{directory} does not hold the adapters any more")
    if foreign_adapters.fingerprint(directory, fingerprint) != quantized.parents["sft"]:
        return Check(_TITLE, skipped=f"{directory} has changed since {quantized.directory} was made from it")
    weights = Weights(references.of_artifact(quantized))
    return check_merge(weights, directory, base, has_rounded=bool(record.writes_rounded))


def _compare(weights: Weights, base: Checkpoint, adapters: "_Adapters", name: str, rows: slice) -> Tensor:
    """Compare some rows of a merged weight with their expected values.

    Returns:
        (4), FP64: the number of wrong values and of all values, and the sums of change * expected change and of the
        squared expected change.
    """
    merged = weights.read_trained(name, rows)
    begun = adapters.begin(name, base.read_plain(name, rows=rows), rows).to(merged.dtype).float()
    delta, error = adapters.delta(name, rows)
    low, expected, high = ((begun + each).to(merged.dtype) for each in (delta - error, delta, delta + error))
    wrong = ~((low <= merged) & (merged <= high))  # NaN is wrong, too
    change, due = merged.double() - begun, expected.double() - begun
    counts = torch.stack([wrong.sum(), torch.tensor(wrong.numel())])
    return torch.cat([counts.double(), torch.stack([(change * due).sum(), due.square().sum()])])


def _problems(name: str, wrong: float, total: float, along: float, due: float, *, is_adapted: bool) -> Iterator[str]:
    if wrong and not is_adapted:
        yield f"{name}: has no adapter, but {wrong:.0f} of {total:.0f} values differ from the base model's"
    elif wrong:
        share = f"The weight has {along / due:.3g} times" if due else "The weight should not have"
        yield (
            f"{name}: {wrong:.0f} of {total:.0f} values differ from base + scaling * B A by more than rounding."
            f" {share} the adapter's change"
        )


class _Adapters:
    """The tensors of saved adapters, by the names of the weights that they change."""

    def __init__(self, directory: Path, weights: Weights) -> None:
        self._config: Mapping[str, Any] = read_config(directory, ADAPTER_CONFIG)
        self._whole: dict[str, Tensor] = {}
        self._factors: dict[str, dict[str, Tensor]] = {}
        self._used: set[str] = set()
        self._experts = weights.shape.num_local_experts
        shapes = {name: info.shape for name, info in plain_tensors(weights.shape).items()}
        for key, tensor in load_file(directory / ADAPTER_WEIGHTS).items():
            path = key.removeprefix(_PREFIX)
            found = _FACTOR.fullmatch(path)
            if found is None:
                self._whole[path.replace(f"{_INNER}.", ".")] = tensor
                continue
            module, side = found[1], found[2]
            self._factors.setdefault(module, {})[side[-1]] = tensor
        self._factors = {self._name(module, pair, shapes): pair for module, pair in self._factors.items()}
        self.adapted = len(self._factors) + len(self._whole)

    def _name(self, module: str, pair: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
        """Return the weight that a pair of factors changes.

        The two stacks of experts have the shapes (E, hidden, 2 * inner) and (E, inner, hidden). They may be equal in
        one dimension, but not in both.
        """
        plain = module.replace(_INNER, "")
        for kind in EXPERT_WEIGHTS:
            shape = shapes.get(f"{plain}.{kind}")
            if shape is not None and (pair["A"].shape[1], pair["B"].shape[0]) == shape[1:]:
                return f"{plain}.{kind}"
        return f"{plain}.weight"

    def begin(self, name: str, base: Tensor, rows: slice) -> Tensor:
        """Return the weights that the delta is added to: the base's, or those that PEFT saved as a whole."""
        self._used.add(name)
        return self._whole[name][rows] if name in self._whole else base

    def skip(self, name: str) -> None:
        """Count the tensors of a weight as compared."""
        self._used.add(name)

    def __contains__(self, name: str) -> bool:
        """Return whether a weight has an adapter."""
        return name in self._factors

    def delta(self, name: str, rows: slice) -> tuple[Tensor, Tensor]:
        """Return scaling * B A for some rows of a weight, in FP32, and a bound of its error. Without an adapter: zeros.

        The bound has two parts. The merge may round the delta to the type of the factors or of the weight. A sum of
        r products in FP32 depends on the order, by at most (r + 2) * 2^-23 * |B| |A| (Higham, Accuracy and Stability
        of Numerical Algorithms, 2002, section 3.1, for two sums with a scaling).
        """
        if (pair := self._factors.get(name)) is None:
            return torch.zeros(()), torch.zeros(())
        a, b = pair["A"].float(), pair["B"].float()
        is_stack = name.endswith(EXPERT_WEIGHTS)
        rank = a.shape[0] // self._experts if is_stack else a.shape[0]
        scaling = self._scaling(name.removesuffix(".weight"), rank)
        multiply = self._multiply_experts if is_stack else _multiply
        delta, size = (multiply(name, *each, rows) * scaling for each in ((a, b), (a.abs(), b.abs())))
        near_zero = torch.finfo(pair["B"].dtype).smallest_normal * _NEAR_ZERO
        return delta, delta.abs() * _ROUNDING + size.abs() * ((rank + 2) * 2.0**-23) + near_zero

    def _multiply_experts(self, _: str, a: Tensor, b: Tensor, rows: slice) -> Tensor:
        of_expert = a.reshape(self._experts, -1, a.shape[1])[rows]
        outputs = b.reshape(b.shape[0], -1, self._experts)[..., rows]
        return torch.einsum("ore,eri->eio", outputs, of_expert)

    def _scaling(self, module: str, rank: int) -> float:
        patterns = self._config.get("alpha_pattern") or {}
        alpha = next(
            (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)),
            self._config["lora_alpha"],
        )
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def unused(self) -> set[str]:
        """Return the names of tensors that belong to no weight which was compared."""
        return {*self._whole, *self._factors} - self._used


def _multiply(name: str, a: Tensor, b: Tensor, rows: slice) -> Tensor:
    product = b @ a
    return (product.T if name == EMBEDDING else product)[rows]
