"""upcast and doctor count the blocks of an MXFP4 base by their largest code: all blocks, or a stated sample."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, run_program
from run_files import source_of
from safetensors.torch import load_file

from pipeline.checkpoints import shards
from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

MAGNITUDES = ("0", "0.5", "1", "1.5", "2", "3", "4", "6")
RECIPE = ("recipe=smoke", *SHORT)


def figures_of(directory: Path, experts: int | None = None) -> dict[str, Any]:
    """Compute the figures of a packed checkpoint's files. `experts` limits the experts of each stack."""
    tensors = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    blocks = [tensor[:experts] for name, tensor in tensors.items() if name.endswith("_blocks")]
    scales = torch.cat([tensor[:experts].flatten() for name, tensor in tensors.items() if name.endswith("_scales")])
    largest = torch.cat([torch.maximum(each & 7, each >> 4 & 7).amax(-1).flatten() for each in blocks])
    return {
        "blocks": len(largest),
        "sampled_experts": experts,
        "shares": {size: int((largest == code).sum()) / len(largest) for code, size in enumerate(MAGNITUDES)},
        "scale_exponents": [int(scales.min()) - 127, int(scales.max()) - 127],
    }


def counted(directory: Path) -> dict[str, Any] | None:
    return artifacts.load(directory).details.get("largest_codes")


def test_a_base_that_is_decoded_is_counted_completely(smoke_run: Path) -> None:
    found = counted(smoke_run / "upcast")
    assert found == figures_of(source_of(smoke_run))
    assert found["shares"]["6"] > 0.1 and sum(found["shares"].values()) == pytest.approx(1)
    (line,) = (each for each in read_metrics(smoke_run / "upcast") if "largest_codes" in each)
    assert line["largest_codes"] == found


def test_a_base_that_is_linked_is_counted_in_a_sample(lora_run: Path) -> None:
    found = counted(lora_run / "upcast")
    assert found == figures_of(source_of(lora_run), 2)
    assert found["blocks"] * 4 == figures_of(source_of(lora_run))["blocks"]


def test_doctor_counts_the_same_sample_if_the_weights_are_there(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("stage=doctor", *RECIPE, f"run_dir={tmp_path}", f"model.path={source_of(smoke_run)}")
    assert run_program(*settings) == 0
    found = counted(tmp_path / "doctor")
    assert found == figures_of(source_of(smoke_run), 2)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"largest code per block: 6 in {found['shares']['6']:.1%}, 4 in " in shown
    assert "(a sample: the first 2 experts of each layer)" in shown


@pytest.mark.parametrize("state", ["missing", "unfinished"])
def test_doctor_works_without_the_weights(
    state: str, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    source = source_of(smoke_run)
    for path in (each for each in source.iterdir() if each.suffix != ".safetensors"):
        (model / path.name).write_bytes(path.read_bytes())
    if state == "unfinished":
        (model / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert run_program("stage=doctor", *RECIPE, f"run_dir={tmp_path / 'run'}", f"model.path={model}") == 0
    assert counted(tmp_path / "run" / "doctor") is None
    out = capsys.readouterr().out
    assert ("blocks are not counted, because its weights are not complete" in out) == (state == "unfinished")


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_bf16_source_is_counted_if_it_is_packed(is_packed: bool, smoke_run: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in (each for each in (smoke_run / "upcast").iterdir() if each.name != artifacts.ARTIFACT_FILE):
        (model / path.name).write_bytes(path.read_bytes())
    experts = ("upcast.experts=packed", "train@sft=lora", "train@qat=lora") if is_packed else ()
    assert run_program("stage=upcast", *RECIPE, *experts, f"run_dir={tmp_path}", f"model.path={model}") == 0
    assert counted(tmp_path / "upcast") == (figures_of(tmp_path / "upcast") if is_packed else None)


def test_a_resumed_upcast_counts_every_block_once(
    smoke_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = shards._Output.publish

    def interrupt(self: Any, i: int) -> None:
        if i == 5:
            raise KeyboardInterrupt
        publish(self, i)

    settings = ("stage=upcast", *RECIPE, f"model.path={source_of(smoke_run)}", "upcast.shard_bytes=100000")
    monkeypatch.setattr(shards._Output, "publish", interrupt)
    assert run_program(*settings, f"run_dir={tmp_path}") == 130
    monkeypatch.undo()
    assert run_program(*settings, f"run_dir={tmp_path}") == 0
    assert counted(tmp_path / "upcast") == counted(smoke_run / "upcast")
