"""Recomputes the merge of adapters that another program saved with PEFT, without the code that export merges with.

Each weight is base + scaling * B A in FP32 (Hu et al., 2021, https://arxiv.org/abs/2106.09685; PEFT's documentation of
`LoraConfig` for rslora, patterns and `target_parameters`). It is computed from adapter_model.safetensors and
adapter_config.json, a part of a tensor at a time.
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
from pipeline.checkpoints.gpt_oss import EXPERT_WEIGHTS, plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.models.weights import Weights
from pipeline.verify.check import Check

_PREFIX, _INNER = "base_model.model.", ".base_layer"
_FACTOR = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")
_ROUNDING = 2.0**-7  # the merge rounds the delta and the sum to BF16, each by up to 2^-9 of its value
_SCALE = 0.05  # largest error of the delta's size. Rounding errors average out in it, other errors do not.


def check_merge(weights: Weights) -> Check:
    """Compare the merged weights of a model with base + scaling * B A. All other weights must be the base model's.

    Args:
        weights: the weights of adapters on their base, as export and the logits use them.
    """
    check = Check("adapters: merged weights equal base + scaling * B A, recomputed in FP32 without PEFT")
    adapters, base = _Adapters(weights.ref.directory, weights), Checkpoint(weights.ref.base)
    for name in plain_tensors(weights.shape):
        sums = torch.zeros(4, dtype=torch.float64)
        for rows in weights.parts(name):
            merged, begun = weights.read_trained(name, rows).float(), base.read_plain(name, rows=rows)
            begun, delta = adapters.begin(name, begun, rows).float(), adapters.delta(name, rows)
            change, expected = merged - begun, torch.zeros(()) if delta is None else delta
            error = ((change - expected).square().sum(), (begun + expected).square().sum())
            sums += torch.stack([*error, (change * expected).sum(), expected.square().sum()]).double()
        check.problems += _problems(name, *sums.tolist())
    check.problems += [f"{key}: belongs to no weight of the model" for key in sorted(adapters.unused())]
    check.measured = {"tensors": adapters.adapted}
    base.close()
    return check


def _problems(name: str, error: float, size: float, along: float, delta: float) -> Iterator[str]:
    """Judge the sums of squares of a tensor: the error, the expected values, change * delta, and the delta."""
    if delta == 0:
        if error:
            yield f"{name}: has no adapter, but differs from the base model's"
    elif not math.sqrt(error) <= _ROUNDING * math.sqrt(size) or not abs(along / delta - 1) <= _SCALE:
        yield (
            f"{name}: differs from base + scaling * B A by {math.sqrt(error / size):.3g} of its size, and has"
            f" {along / delta:.3g} times the adapter's change"
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

    def delta(self, name: str, rows: slice) -> Tensor | None:
        """Return scaling * B A for some rows of a weight, in FP32, or None if the weight has no adapter."""
        if (pair := self._factors.get(name)) is None:
            return None
        a, b = pair["A"].float(), pair["B"].float()
        if not name.endswith(EXPERT_WEIGHTS):
            product = b @ a * self._scaling(name.removesuffix(".weight"), a.shape[0])
            return (product.T if name.endswith("embed_tokens.weight") else product)[rows]
        rank = a.shape[0] // self._experts
        of_expert = a.reshape(self._experts, rank, -1)[rows]
        outputs = b.reshape(b.shape[0], rank, self._experts)[..., rows]
        return torch.einsum("ore,eri->eio", outputs, of_expert) * self._scaling(name, rank)

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
