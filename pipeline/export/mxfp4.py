"""The Hugging Face layout of openai/gpt-oss: MXFP4 experts, everything else BF16, config.json as the source has it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipeline.checkpoints.gpt_oss import BLOCKS_SUFFIX, QUANTIZATION_CONFIG, other_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.shards import Written
from pipeline.export.exporter import Exporter
from pipeline.export.job import Job
from pipeline.export.layout import packed_layout
from pipeline.export.weights import checked_base, others_piece, packed_piece, stacks, write_checkpoint
from pipeline.runs.artifacts import Kind

_DIALECT = ("rope_parameters", "dtype", "torch_dtype")


def write(job: Job, directory: Path) -> Written:
    """Stream the model into `directory`, expert by expert.

    Raises:
        UserError: NaN or Inf in a weight, or an input dimension that 32 does not divide: names tensor, expert, block;
            a source of other sizes.
    """
    base = checked_base(job)
    pieces = [others_piece(job, base, name, [name]) for name in other_tensors(base.shape)]
    pieces += [packed_piece(each, each.projection.blocks, each.projection.scales) for each in stacks(job, base)]
    return write_checkpoint(job, base, directory, pieces, released_config(base.config))


def described(base: Checkpoint, _: Collection[str]) -> dict[str, Any]:
    """What config.json must say."""
    return released_config(base.config)


def released_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the export: the source's; a BF16 source's gets the quantization and the rope keys of the original.

    transformers 5 writes `rope_parameters`; the engines read `rope_scaling` and `rope_theta`.
    """
    if "quantization_config" in config:
        return config
    return {**legacy_config(config), "quantization_config": QUANTIZATION_CONFIG}


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the rope keys that engines read, and without its type."""
    legacy = {key: value for key, value in config.items() if key not in _DIALECT}
    rope = config.get("rope_parameters")
    if rope:
        legacy["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        legacy["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 150000))
    return legacy


EXPORTER = Exporter(write=write, kind=Kind.packed, layout=packed_layout, described=described, mark=BLOCKS_SUFFIX)
