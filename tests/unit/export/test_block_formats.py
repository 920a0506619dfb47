"""Exports in block formats that no row of FORMATS has yet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import TinyConfig
from pipeline.export import EXPORTERS
from pipeline.export.job import Job
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.codec import fake_quantize
from pipeline.numerics.formats import MXFP4, NVFP4, BlockFormat

STACK = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    "block_format", [replace(MXFP4, name="mxfp4_16", block_size=16), MXFP4, NVFP4], ids=lambda each: each.name
)
def test_a_partly_changed_stack_is_exported_as_training_rounds_it(block_format: BlockFormat, tmp_path: Path) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    create_tiny(base, TinyConfig())
    trained = export_bf16(base, tuned, Source(base, ""), MXFP4)
    trained[STACK][2] *= 1.3
    save_file(trained, weights_of(tuned), metadata={"format": "pt"})
    exported = export_bf16(tuned, tmp_path / "export", Source(base, ""), block_format)
    rounded = fake_quantize(trained[STACK].transpose(1, 2), block_format).transpose(1, 2)
    assert torch.equal(exported[STACK], rounded)


def export_bf16(model: Path, into: Path, source: Source, block_format: BlockFormat) -> dict[str, Tensor]:
    """Export a full checkpoint to one BF16 file, and return its tensors."""
    into.mkdir()
    EXPORTERS["bf16"].write(Job(Weights(ModelRef("tiny", model, model)), source, block_format, 1 << 30, "cpu"), into)
    return load_file(weights_of(into))


def weights_of(checkpoint: Path) -> Path:
    """Return the only weight file of a checkpoint."""
    (file,) = checkpoint.glob("*.safetensors")
    return file
