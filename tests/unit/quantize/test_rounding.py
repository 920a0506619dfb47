"""Written experts are values of the format that the format's rule keeps, also at the limits of its scales."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.checkpoints.reading import Checkpoint
from pipeline.config import TinyConfig
from pipeline.export.account import total
from pipeline.models import saving
from pipeline.models.references import ModelRef
from pipeline.models.tiny_model import create_tiny
from pipeline.models.weights import Weights
from pipeline.numerics.codec import fake_quantize, same_bits
from pipeline.numerics.formats import MXFP4, NVFP4, BlockFormat
from pipeline.quantize import rounding
from pipeline.quantize.rounding import Job

NAME = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    create_tiny(directory, TinyConfig(num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2))
    return directory


@pytest.fixture(scope="module")
def trained_unevenly(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return change(base, tmp_path_factory.mktemp("trained") / "unevenly", uneven)


def change(base: Path, directory: Path, edit: Callable[[Tensor], Tensor]) -> Path:
    """Decode the model, and edit its expert weights (E, in, out)."""
    directory.mkdir()
    saving.write_plain(ModelRef("base", base, base), directory)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        edited = {
            name: edit(tensor).to(tensor.dtype).contiguous() if name.endswith("experts.down_proj") else tensor
            for name, tensor in tensors.items()
        }
        save_file(edited, path, {"format": "pt"})
    return directory


def job(base: Path, trained: Path, block_format: BlockFormat, *, rule: str | None = None, seed: int | None = 1) -> Job:
    packed = Checkpoint(base)
    return Job(Weights(ModelRef("x", trained, trained)), packed, packed, block_format, rule, seed, "cpu")


def uneven(values: Tensor) -> Tensor:
    """Give the columns of an expert sizes from 1 to 2^-26, which is more than the scales of e4m3 can hold."""
    return values * torch.linspace(0, -26, values.shape[-1]).exp2() * 1.3


@pytest.mark.parametrize("rule", [None, "ceil", "floor", "mse"])
@pytest.mark.parametrize(
    "block_format",
    [NVFP4.with_rule("mse"), *(MXFP4.with_rule(each) for each in ("ceil", "floor", "mse"))],
    ids=lambda row: f"{row.name}-{row.scale_rule}",
)
def test_the_rule_of_the_format_keeps_the_written_weights(
    block_format: BlockFormat, rule: str | None, base: Path, trained_unevenly: Path, tmp_path: Path
) -> None:
    written = rounding.write_plain(job(base, trained_unevenly, block_format, rule=rule), _made(tmp_path / "out"))
    found = Checkpoint(tmp_path / "out")
    for projection in expert_projections(found.shape):
        values = found.read_plain(projection.name)
        assert same_bits(fake_quantize(values.transpose(1, 2), block_format).transpose(1, 2), values)
    adjusted = total(note["sums"] for note in written.notes).sums["adjusted_blocks"]
    assert (adjusted > 0) == (block_format.name == "nvfp4" and rule == "mse"), "only the smallest scales of e4m3"


def test_a_packed_model_has_the_values_of_a_plain_one(base: Path, tmp_path: Path) -> None:
    trained = change(base, tmp_path / "trained", lambda values: values * 1.05)
    work = job(base, trained, MXFP4)
    for write, name in ((rounding.write_plain, "plain"), (rounding.write_packed, "packed")):
        write(work, _made(tmp_path / name))
    plain, packed = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "packed")
    assert packed.is_packed and not plain.is_packed
    for name in work.weights.names():
        assert same_bits(plain.read_plain(name), packed.read_plain(name))


def test_measuring_gives_the_account_of_writing(base: Path, tmp_path: Path) -> None:
    trained = change(base, tmp_path / "trained", lambda values: values * 1.05)
    work = job(base, trained, MXFP4)
    written = rounding.write_plain(work, _made(tmp_path / "out")).notes
    expected = [note for note in written if "sums" in note]
    assert sorted(rounding.measure(work), key=str) == sorted(expected, key=str)


def test_weights_beyond_the_scales_of_the_base_are_clipped_and_counted(base: Path, tmp_path: Path) -> None:
    trained = change(base, tmp_path / "trained", lambda values: values * 4)
    sums = total(note["sums"] for note in rounding.measure(job(base, trained, MXFP4))).sums
    values = Checkpoint(base).read_plain(NAME)
    scales = (Checkpoint(base).read(f"{NAME}_scales").int() - 127).float().exp2()
    blocks = values.transpose(1, 2).float().unflatten(-1, (-1, 32)) / scales.unsqueeze(-1)
    assert sums["clipped"] >= (blocks.abs() * 4 > 6).sum() > 0


def test_an_unchanged_base_is_kept_and_nothing_is_divided_by_zero(base: Path, tmp_path: Path) -> None:
    trained = change(base, tmp_path / "trained", lambda values: values)
    for block_format in (MXFP4, NVFP4.with_rule("mse")):
        figures = total(note["sums"] for note in rounding.measure(job(base, trained, block_format))).figures()
        assert figures == {**dict.fromkeys(figures, 0), "kept": None}


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory
