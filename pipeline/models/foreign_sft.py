"""Judges adapters of another program that `quantize.source` makes the run's SFT, and copies them for QAT.

`references.stage_ref` finds them. `quantize` merges them, unless QAT trains adapters on a base that is not rounded.
Then QAT continues with them, and `qat.lora` must describe them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.checkpoints.config_json import is_quantized, read_config
from pipeline.checkpoints.gpt_oss import (
    ATTENTION_PROJECTIONS,
    EXPERT_WEIGHTS,
    Shape,
    attention_projection,
    expert_parameter,
)
from pipeline.checkpoints.side_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    choose_side_files,
    copy_side_files,
    describe_differences,
)
from pipeline.config import (
    FormatName,
    LoraConfig,
    LoraTarget,
    Method,
    PipelineConfig,
    Stage,
    adapted_layers,
    rebuilds,
    rounds_base,
)
from pipeline.config.overrides import assignment
from pipeline.errors import UserError, list_first
from pipeline.models import references
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.runs.artifacts import Artifact
from pipeline.runs.console import say, warn
from pipeline.runs.json_files import write_json
from pipeline.runs.run import Run

if TYPE_CHECKING:
    from pipeline.models.merging import Merger

_PROJECTIONS = {
    LoraTarget.attention: [
        lambda i, name=name: f"{attention_projection(i, name)}.weight" for name in ATTENTION_PROJECTIONS
    ],
    LoraTarget.experts: [lambda i, name=name: expert_parameter(i, name) for name in EXPERT_WEIGHTS],
}


def check(run: Run, base: Path) -> None:
    """Check what can be known of the adapters in `quantize.source` before the model is read. Without adapters: nothing.

    Args:
        run: the run.
        base: directory of the base model. Its weights are not needed.

    Raises:
        UserError: the directory holds no adapters that this program merges exactly, or they do not fit the base model;
            they leave nothing to round; QAT cannot continue with them as configured; or the run has an SFT of its own.
    """
    config, source = run.config, run.config.quantize.adapters
    if source is None:
        return
    directory = references.adapters_directory(source, "quantize.source")
    if run.is_complete(Stage.sft):
        raise UserError(
            f"quantize.source={source}: the run has an SFT of its own, {run.stage_dir(Stage.sft)}. A run has one SFT."
            " Set another run_dir for these adapters, or quantize.source=sft."
        )
    if run.is_complete(Stage.quantize) and not rebuilds(config.overwrite, Stage.quantize):
        return  # its inputs are compared, which needs no large library
    from transformers import AutoConfig

    from pipeline.models.merging import Merger

    merger = Merger(directory, AutoConfig.from_pretrained(base), torch.bfloat16)
    model = read_config(base)
    is_mxfp4 = config.format.name is FormatName["mxfp4"] and is_quantized(model)
    if is_mxfp4 and not any(name.endswith(EXPERT_WEIGHTS) for name in merger.names()):
        command = run.command(Stage.export, assignment("export.source", source))
        raise UserError(
            f"quantize.source={source}: there is nothing to round. The adapters do not change the experts, which are"
            " still the source's own MXFP4 weights. So the merged model needs neither quantize nor qat. Export it:"
            f" {command}"
        )
    if _continues(config):
        _raise_if_described_otherwise(source, config.qat.lora, merger, Shape.of(model, base).num_hidden_layers)


def raise_if_changed(run: Run, quantized: Artifact) -> None:
    """Raise UserError if the adapters in `quantize.source` have changed since `quantize` read them.

    Adapters that were deleted are not compared.
    """
    source = run.config.quantize.adapters
    if source is None or not references.is_loadable(run, Stage.sft):
        return
    if references.stage_ref(run, Stage.sft).fingerprint != quantized.parents.get(Stage.sft.name):
        raise UserError(
            f"{quantized.directory} was made from other adapters than quantize.source={source} holds. Rebuild it:"
            f" {run.command(Stage.quantize, 'overwrite=true')}"
        )


def tell(run: Run, ref: ModelRef) -> None:
    """Say whose adapters are quantized. Warn about another base, and about a tokenizer or template of their own."""
    base = Source(ref.base, run.require(Stage.upcast).parents["source"])
    references.warn_of_other_base(run, ref.directory, base, f"quantize.source={run.config.quantize.source}")
    say("quantize", f"{ref.directory} is this run's SFT: adapters of another program, on {ref.base}")
    own = describe_differences(ref.base, choose_side_files(ref.base, ref.directory))
    for line in own.values():
        warn("quantize", f"{line}. The run uses the file of model.path. To use the other one, put it into model.path.")


def copy(ref: ModelRef, directory: Path) -> ModelRef:
    """Copy adapters into a stage's directory, as QAT saves adapters: with FP32 factors, without dropout.

    A hard link would let changes of the user's file change the run.
    """
    from safetensors.torch import load_file, save_file

    copy_side_files(ref.base, directory)
    factors = {name: each.float().contiguous() for name, each in load_file(ref.directory / ADAPTER_WEIGHTS).items()}
    save_file(factors, directory / ADAPTER_WEIGHTS, {"format": "pt"})
    relative = references.relative_base(ref.base, directory)
    stored = read_config(ref.directory, ADAPTER_CONFIG)
    write_json(directory / ADAPTER_CONFIG, {**stored, "base_model_name_or_path": relative, "lora_dropout": 0.0})
    return replace(ref, directory=directory)


def _continues(config: PipelineConfig) -> bool:
    """Return whether QAT continues with the adapters. Otherwise `quantize` merges them."""
    return config.qat.method is Method.lora and not rounds_base(config.quantize, config.qat, config.format)


def _raise_if_described_otherwise(source: str, lora: LoraConfig, merger: "Merger", count: int) -> None:
    found = merger.adapters()
    reasons = list(_differences(found, merger.replaced(), lora, count))
    if not reasons:
        return
    described = None if merger.replaced() else _describe(found, count)
    remedy = "qat.lora cannot describe them. Set" if described is None else f"Set {described}. Or set"
    raise UserError(
        f"quantize.source={source}: QAT continues with these adapters, but {'; '.join(reasons)}. {remedy}"
        " quantize.method=stochastic or gptq. Then quantize merges the adapters into a rounded base, and QAT trains new"
        " ones."
    )


def _differences(
    found: Mapping[str, tuple[int, float]], replaced: list[str], lora: LoraConfig, count: int
) -> Iterator[str]:
    """Yield the reasons why adapters are not those of `lora` in a model of `count` layers.

    `found` has the rank and the scale of each adapter. `replaced` lists parameters that whole tensors replace.
    """
    expected = _names(lora.targets, adapted_layers(lora, count))
    if replaced:
        yield f"they hold whole tensors too ({list_first(replaced)})"
    if more := sorted(found.keys() - expected):
        yield f"they adapt {list_first(more)}, which qat.lora does not"
    if less := sorted(expected - found.keys()):
        yield f"they do not adapt {list_first(less)}, which qat.lora does"
    if ranks := [str(rank) for rank in sorted({rank for rank, _ in found.values()} - {lora.rank})]:
        yield f"their rank is {list_first(ranks)}, and qat.lora.rank={lora.rank}"
    scale = lora.alpha / lora.rank
    if scales := [f"{scaling:g}" for scaling in sorted({scaling for _, scaling in found.values()} - {scale})]:
        yield f"their scale (alpha / rank) is {list_first(scales)}, and qat.lora.alpha={lora.alpha} gives {scale:g}"


def _describe(found: Mapping[str, tuple[int, float]], count: int) -> str | None:
    """Return the settings of `qat.lora` that describe adapters, or None if there are none."""
    (rank, scaling), *others = set(found.values())
    targets = [target for target in LoraTarget if _names([target], range(count)) & found.keys()]
    layers = [i for i in range(count) if _names(targets, [i]) & found.keys()]
    alpha = rank * scaling
    if others or alpha != int(alpha) or _names(targets, layers) != found.keys():
        return None
    words = [f"rank={rank}", f"alpha={int(alpha)}", f"targets=[{','.join(target.name for target in targets)}]"]
    where = "null" if len(layers) == count else f"[{','.join(map(str, layers))}]"
    return " ".join(f"qat.lora.{word}" for word in [*words, f"layers={where}", "every_nth=null"])


def _names(targets: "list[LoraTarget]", layers: "list[int] | range") -> set[str]:
    return {name(i) for target in targets for i in layers for name in _PROJECTIONS[target]}
