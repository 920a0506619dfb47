"""Checkpoints for serving: one file per target, one row in EXPORTERS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import Kind
from pipeline.export import bf16, gguf, mxfp4, nvfp4, openai
from pipeline.export.target import Job
from pipeline.shards import Written


@dataclass(frozen=True)
class Target:
    """A layout.

    Attributes:
        write: (job, directory) -> what was written.
        kind: of the directory.
    """

    write: Callable[[Job, Path], Written]
    kind: Kind


EXPORTERS = {
    "mxfp4": Target(mxfp4.write, Kind.packed),
    "openai": Target(openai.write, Kind.foreign),
    "nvfp4": Target(nvfp4.write, Kind.foreign),
    "gguf": Target(gguf.write, Kind.foreign),
    "bf16": Target(bf16.write, Kind.checkpoint),
}
"""Layouts by name.

Each note of what `write` returns has `tensors` (names), `is_copied` (whether they are the source's own bytes), and, of
experts, `layer`, `copied_experts`, `other_than_trained` and `sums` of Survival.
"""
