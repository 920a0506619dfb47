"""Rounds the experts of a model with GPTQ, one decoder layer after the other.

The calibration examples pass through the layers. The Hessian of an expert comes from the tokens that the router gives
to it. gate_up_proj is rounded first. The inputs of down_proj come from the rounded gate_up_proj, and the states of the
next layer from the rounded experts. So each matrix is rounded for the inputs that it gets in the rounded model.

GPTQ overfits an expert that has few tokens. An expert with fewer tokens per input dimension than the limit is rounded
by the fallback: stochastically or to the nearest values.

Legend: E = experts, g = experts of a group, N = tokens, n = tokens of an expert, in = input dimension, out = output
dimension, H = hidden size, I = intermediate size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.checkpoints.gpt_oss import ExpertProjection
from pipeline.errors import UserError
from pipeline.export.account import Scales
from pipeline.export.weights import bad_block
from pipeline.models.layerwise import Layer, Routed, Walk
from pipeline.numerics import codec, gptq
from pipeline.numerics.gptq import HessianError, Hessians
from pipeline.numerics.stochastic import Noise
from pipeline.quantize.codes import Coverage, LayerCodes, StoredExperts
from pipeline.quantize.experts import round_experts, settle
from pipeline.quantize.rounding import Job
from pipeline.runs.console import progress
from pipeline.runs.disk import raise_if_disk_too_small

_GROUP_BYTES = {"cpu": 2 << 20}
"""Memory of a group of experts on each type of device. A group has at least one expert."""

_GROUP_BYTES_ON_GPU = 8 << 30


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ rounds.

    Attributes:
        damping: see `round_gptq`.
        least_tokens: an expert with fewer tokens per input dimension is rounded by the fallback.
        fallback_seed: seed of stochastic rounding, or None to round to the nearest values.
    """

    damping: float
    least_tokens: float
    fallback_seed: int | None


def round_layers(
    job: Job,
    settings: GptqSettings,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    attention: str,
    directory: Path,
    output_bytes: int,
) -> LayerCodes:
    """Round all experts, and store them in `directory`. An interrupted run resumes at the last complete layer.

    Args:
        job: the model, its format and its scales.
        settings: how to round.
        batches: calibration examples, as batches of `losses.batches`.
        attention: attention implementation of transformers.
        directory: directory for the layers. If it holds interrupted work, the arguments must be the same.
        output_bytes: bytes that the caller will write to the same disk afterwards.

    Raises:
        UserError: the disk is too small, a weight is NaN or Inf, or GPTQ cannot use a Hessian.
    """
    codes, layers = LayerCodes(directory), job.weights.shape.num_hidden_layers
    done = codes.complete_layers(layers)
    if done == layers:
        return codes
    walk = Walk(job.weights, batches, job.device, attention)
    states = codes.states(done - 1, walk.device) if done else walk.embed()
    new_states = 1 if done else 2  # the newest states are removed only after the next ones are complete
    raise_if_disk_too_small(directory, _codes_bytes(job, layers - done) + new_states * states.nbytes + output_bytes)
    for number in progress(range(done, layers), what="gptq", unit="layer"):
        work = _LayerWork(job, settings, number)
        with walk.layer(number) as layer:
            states = work.run(layer, states)
        codes.save(number, work.stored, work.note(), states if number + 1 < layers else None)
    return codes


def _codes_bytes(job: Job, layers: int) -> int:
    values = sum(each.values for each in job.projections if each.layer < layers)
    return int(values * job.block_format.bits_per_value / 8)


class _LayerWork:
    """Rounds the experts of one layer.

    Attributes:
        stored: the rounded experts of each stack.
    """

    def __init__(self, job: Job, settings: GptqSettings, number: int) -> None:
        self._job, self._settings = job, settings
        self._gate_up, self._down = (each for each in job.projections if each.layer == number)
        self._parts: dict[ExpertProjection, list[StoredExperts]] = {self._gate_up: [], self._down: []}
        self._tokens: list[int] = []
        self._fell_back: set[int] = set()

    def run(self, layer: Layer, states: Tensor) -> Tensor:
        """Round the layer for the states before it, (N, H). Return the states after it."""
        routed = layer.attend(states)
        self._tokens = [len(each) for each in routed.tokens]
        outputs = torch.zeros_like(routed.residual)
        for group in self._groups():
            self._run_group(layer, routed, group, outputs)
        return outputs.add_(routed.residual)

    def _run_group(self, layer: Layer, routed: Routed, group: range, outputs: Tensor) -> None:
        """Round a group of experts, and add their outputs to `outputs` (N, H)."""
        inputs = [[(part, routed.inputs[part]) for part, _ in routed.parts(expert)] for expert in group]
        weights = self._round(self._gate_up, group, [[rows for _, rows in each] for each in inputs])
        gated = [
            [layer.gate_up(expert, rows, weight) for _, rows in each]
            for expert, each, weight in zip(group, inputs, weights, strict=True)
        ]
        del inputs
        weights = self._round(self._down, group, gated)
        for expert, each, weight in zip(group, gated, weights, strict=True):
            for (tokens, shares), rows in zip(routed.parts(expert), each, strict=True):
                outputs.index_add_(0, tokens, layer.down(expert, rows, weight) * shares.unsqueeze(-1))

    def _round(self, projection: ExpertProjection, group: range, inputs: Sequence[Sequence[Tensor]]) -> Tensor:
        """Round a group of experts of a stack, and store them.

        `inputs` has parts of the inputs of each expert, (n, in). The result has the values that stay, (g, in, out).
        """
        hessians = Hessians(len(group), projection.in_features, self._job.device)
        for i, parts in enumerate(inputs):
            for part in parts:
                hessians.add(i, part)
        self._raise_if_not_finite(projection, group, hessians)
        trained, scales = self._read(projection, group)
        few = hessians.with_too_few_tokens(self._settings.least_tokens)
        self._fell_back.update(group[i] for i in few)
        rounded, clipped = self._fall_back(projection, group, trained, scales, few)
        enough = [i for i in range(len(group)) if i not in few]
        if enough:
            rounded[enough] = self._round_gptq(projection, group, trained, scales, hessians, enough=enough)
        made = round_experts(rounded, self._job.block_format, scales)
        blocks, stored, unit = (None if each is None else each.cpu() for each in (made.blocks, *scales))
        assert blocks is not None and stored is not None
        self._parts[projection].append(StoredExperts(blocks, stored, torch.tensor(clipped), unit))
        return settle(made.values, self._job.block_format, projection.name)[0]

    def _raise_if_not_finite(self, projection: ExpertProjection, group: range, hessians: Hessians) -> None:
        """Check the inputs of all experts, also of those that the fallback rounds."""
        largest = torch.linalg.vector_norm(hessians.means, torch.inf, dim=(1, 2))
        for expert, is_finite in zip(group, largest.isfinite().tolist(), strict=True):
            if not is_finite:
                error = HessianError(expert, "has NaN or Inf", is_finite=False)
                raise _unusable(f"{projection.name}: expert {expert}", error, self._settings.damping)

    def _read(self, projection: ExpertProjection, group: range) -> tuple[Tensor, Scales]:
        """Read the weights of a group, (g, in, out), and choose their scales."""
        job, rows = self._job, slice(group.start, group.stop)
        trained = job.weights.read_trained(projection.name, rows, device=job.device)
        packed = None if job.packed is None else job.packed.read_stored(projection.name, rows)
        try:
            codec.raise_if_not_finite(trained.transpose(1, 2), job.block_format)
            return trained, job.scales_for(projection, trained, job.own_scales(packed))
        except codec.CodecError as error:
            where = job.weights.ref.directory
            raise bad_block(error, where, projection, rows, "Training went wrong.") from error

    def _fall_back(
        self, projection: ExpertProjection, group: range, trained: Tensor, scales: Scales, few: Sequence[int]
    ) -> tuple[Tensor, list[int]]:
        """Round the experts in `few` by the fallback. Count the clipped weights of every expert of the group."""
        seed, rounded, clipped = self._settings.fallback_seed, torch.empty_like(trained), []
        for i, expert in enumerate(group):
            one = slice(i, i + 1)
            noise = None if seed is None or i not in few else Noise.of(seed, projection.name)
            own = scales[0][one], None if scales[1] is None else scales[1][one]
            made = round_experts(trained[one], self._job.block_format, own, noise, expert)
            rounded[one] = made.values
            clipped.append(made.clipped)
        return rounded, clipped

    def _round_gptq(
        self,
        projection: ExpertProjection,
        group: range,
        trained: Tensor,
        scales: Scales,
        hessians: Hessians,
        *,
        enough: Sequence[int],
    ) -> Tensor:
        """Round the experts in `enough` with GPTQ. The result has the shape (experts, in, out)."""
        stored, unit = scales
        try:
            return gptq.round_gptq(
                trained[enough].transpose(1, 2),
                hessians.means[enough],
                self._job.block_format,
                stored=stored[enough],
                tensor_scale=None if unit is None else unit[enough],
                damping=self._settings.damping,
            ).transpose(1, 2)
        except HessianError as error:
            place = f"{projection.name}: expert {group[enough[error.expert]]}"
            raise _unusable(place, error, self._settings.damping) from error

    def _groups(self) -> Iterator[range]:
        """Split the experts into consecutive groups that fit into memory."""
        experts, first, size = len(self._tokens), 0, 0
        limit = _GROUP_BYTES.get(self._job.device, _GROUP_BYTES_ON_GPU)
        for expert in range(experts):
            needed = self._bytes_of(expert)
            if expert > first and size + needed > limit:
                yield range(first, expert)
                first, size = expert, 0
            size += needed
        yield range(first, experts)

    def _bytes_of(self, expert: int) -> int:
        """Estimate the bytes that an expert takes while it is rounded: Hessians, the sweep, weights and inputs."""
        wide, narrow = self._gate_up, self._down
        hessians = 4 * (wide.in_features**2 + narrow.in_features**2)
        sweep = 4 * wide.in_features * (wide.in_features + max(wide.in_features, wide.out_features))
        width = self._job.weights.ref.dtype.itemsize
        weights = 4 * width * wide.in_features * wide.out_features
        return hessians + sweep + weights + self._tokens[expert] * width * (wide.in_features + narrow.in_features)

    @property
    def stored(self) -> dict[ExpertProjection, StoredExperts]:
        return {projection: _join(parts) for projection, parts in self._parts.items()}

    def note(self) -> Coverage:
        """Return the tokens of each expert, and the experts that were rounded by the fallback."""
        return {"tokens": self._tokens, "fallback": sorted(self._fell_back)}


def _join(parts: Sequence[StoredExperts]) -> StoredExperts:
    units = [part.tensor_scale for part in parts if part.tensor_scale is not None]
    return StoredExperts(
        torch.cat([part.blocks for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.clipped for part in parts]),
        torch.cat(units) if units else None,
    )


def _unusable(place: str, error: HessianError, damping: float) -> UserError:
    if error.is_finite:
        return UserError(
            f"{place}: quantize.damping={damping:g}: the Hessian {error.problem}."
            f" Set a larger quantize.damping, such as {10 * damping:g}."
        )
    return UserError(
        f"{place}: the Hessian {error.problem}: the expert's inputs on the calibration examples are not finite or too"
        " large. Training went wrong."
    )
