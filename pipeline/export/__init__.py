"""Checkpoints for serving: one file per target, one row in EXPORTERS."""

from collections.abc import Callable
from pathlib import Path

from pipeline.export import bf16, gguf, mxfp4, openai
from pipeline.export.target import Job
from pipeline.shards import Written

EXPORTERS: dict[str, Callable[[Job, Path], Written]] = {
    "mxfp4": mxfp4.write,
    "openai": openai.write,
    "gguf": gguf.write,
    "bf16": bf16.write,
}
"""Target -> writer(job, directory).

Each note of what it returns has `tensors` (names), `is_copied` (whether they are the source's own bytes), and, of
experts, `layer`, `copied_experts`, `other_than_trained` and `sums` of Survival.
"""
