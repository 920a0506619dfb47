"""Checkpoints are read, exported and verified by their paths."""

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import source_of

from pipeline import FORMATS, UserError, decode, encode, export_checkpoint, read_tensors, verify_checkpoint
from pipeline.checkpoints.gpt_oss import expert_projections
from pipeline.checkpoints.reading import Checkpoint
from pipeline.config.targets import TARGETS
from pipeline.numerics.codec import same_bits
from pipeline.runs.artifacts import BOOKKEEPING


@pytest.fixture(scope="module")
def base(smoke_run: Path) -> Path:
    return source_of(smoke_run)


Refusal = Callable[..., str]


@pytest.fixture
def refusal(smoke_run: Path, base: Path, tmp_path: Path) -> Refusal:
    """A function that exports with wrong arguments, and returns the error's message."""

    def of(**arguments: Any) -> str:
        with pytest.raises(UserError) as raised:
            export_checkpoint(**{"model": smoke_run / "qat", "base": base, "out": tmp_path / "out", **arguments})
        return str(raised.value)

    return of


def test_an_export_by_path_has_the_files_of_the_stage(smoke_run: Path, base: Path, tmp_path: Path) -> None:
    out = export_checkpoint(smoke_run / "qat", base, tmp_path / "deep" / "out", shard_bytes=5_000_000_000)
    assert out == tmp_path / "deep" / "out"
    staged = sorted({path.name for path in (smoke_run / "export" / "mxfp4").iterdir()} - BOOKKEEPING)
    assert sorted(path.name for path in out.iterdir()) == staged
    assert filecmp.cmpfiles(smoke_run / "export" / "mxfp4", out, staged, shallow=False) == (staged, [], [])
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_exported_and_passes_the_checks(
    smoke_run: Path, base: Path, tmp_path: Path, target: str
) -> None:
    out = export_checkpoint(smoke_run / "qat", base, tmp_path / "out", target=target)
    assert [(check.title, check.problems) for check in verify_checkpoint(out, base) if check.status != "ok"] == []


def test_adapters_are_merged(lora_run: Path, tmp_path: Path) -> None:
    (source,) = (lora_run / "source").iterdir()
    out = export_checkpoint(lora_run / "qat", source, tmp_path / "out")
    name = "model.safetensors.index.json"
    weights = [path.name for path in out.glob("*.safetensors")]
    assert filecmp.cmpfiles(lora_run / "export", out, [*weights, name], shallow=False)[1:] == ([], [])


def test_a_damaged_export_fails_a_check_that_names_the_file(smoke_run: Path, base: Path, tmp_path: Path) -> None:
    out = export_checkpoint(smoke_run / "qat", base, tmp_path / "out")
    (out / "generation_config.json").unlink()
    (failed,) = (check for check in verify_checkpoint(out, base) if check.status == "FAILED")
    assert "generation_config.json" in failed.problems[0]


def test_decoding_to_bf16_and_encoding_again_restores_every_byte(base: Path, tmp_path: Path) -> None:
    plain = export_checkpoint(base, base, tmp_path / "plain", target="bf16")
    packed = export_checkpoint(plain, base, tmp_path / "packed")
    assert not Checkpoint(plain).is_packed
    (weights,) = (path.name for path in packed.glob("*.safetensors"))
    stored, again = (Checkpoint(directory) for directory in (base, packed))
    assert (packed / weights).is_file() and all(
        torch.equal(stored.read(name), again.read(name)) for name in stored.tensors
    )
    assert dict(read_tensors(plain)).keys() == dict(read_tensors(base)).keys()
    assert all(same_bits(one, dict(read_tensors(base))[name]) for name, one in read_tensors(plain))


def test_the_codec_encodes_what_read_tensors_reads(base: Path) -> None:
    projection = expert_projections(Checkpoint(base).shape)[0]
    ((name, values),) = read_tensors(base, [projection.name], torch.float32)
    assert name == projection.name and values.shape == (
        projection.experts,
        projection.in_features,
        projection.out_features,
    )
    blocks, scales = encode(values.transpose(1, 2), FORMATS["mxfp4"])
    assert same_bits(decode(blocks, scales, torch.float32), values.transpose(1, 2).contiguous())


def test_unknown_tensors_are_refused_with_similar_names(base: Path) -> None:
    with pytest.raises(UserError, match=r"'lm_head.weigh' is no tensor of .* Did you mean 'lm_head.weight'\?"):
        read_tensors(base, ["lm_head.weight", "lm_head.weigh"])


def test_wrong_arguments_of_an_export_are_reported_together(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = refusal(out=tmp_path, target="mxpf4", format="fp4", device="gpu")
    assert found.startswith("4 problems:")
    assert "target='mxpf4': no such choice. Did you mean 'mxfp4'" in found
    assert f"out='{tmp_path}': exists and is not empty" in found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"model": "/no/model"}, "model='/no/model': no such directory."),
        ({"base": "/no/base"}, "base='/no/base': no such directory."),
        ({"target": "gguf", "format": "nvfp4"}, "target='gguf': cannot hold format='nvfp4', only mxfp4."),
        ({"target": "nvfp4", "format": "nvfp4"}, "was trained for format='mxfp4'"),
        ({"scale_rule": "nearest"}, "scale_rule='nearest': mxfp4 has ceil, floor, mse."),
        ({"scale_rule": "mse"}, "not 'mxfp4' with 'mse'. The export would have other weights"),
        ({"out": "/proc/out"}, "out='/proc/out': cannot be written"),
    ],
)
def test_an_export_that_cannot_be_right_is_refused_and_leaves_nothing(
    refusal: Refusal, tmp_path: Path, arguments: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_not_a_model(refusal: Refusal, smoke_run: Path) -> None:
    found = refusal(model=smoke_run / "verify")
    assert found == f"{smoke_run / 'verify'} is the report of stage=verify, not a model."


def test_a_failed_export_leaves_no_directory(refusal: Refusal, tmp_path: Path) -> None:
    """Another base model has tensors of other sizes, which is found while the export runs."""
    from pipeline.config import TinyConfig
    from pipeline.models.tiny_model import create_tiny

    create_tiny(tmp_path / "other", TinyConfig(hidden_size=128))
    assert "128" in refusal(base=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_missing_directories_are_refused_by_verify(base: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint='/no': no such directory\."):
        verify_checkpoint("/no", base)
    with pytest.raises(UserError, match=r"reference='/no': no such directory\."):
        verify_checkpoint(base, "/no")
