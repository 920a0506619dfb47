"""NaN and Inf in a checkpoint's tensors: found while its files are hashed, in a sample, and while pieces are made."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoints import shards, soundness
from pipeline.checkpoints.gpt_oss import TensorInfo
from pipeline.checkpoints.non_finite import find_nan_scales, find_non_finite
from pipeline.checkpoints.reading import TensorFiles
from pipeline.checkpoints.shards import Piece, Step
from pipeline.errors import UserError

NAN, INF = float("nan"), float("inf")


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "norm.weight": torch.randn(64).bfloat16(),
        "head.weight": torch.randn(300, 64).bfloat16(),
        "wide.weight": torch.randn(5, 7),
        "half.weight": torch.randn(5, 8).half(),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 4),
        "down_proj_scales": torch.randint(0, 255, (4, 16, 3), dtype=torch.uint8),
        "down_proj_blocks": torch.randint(0, 256, (4, 16, 3, 16), dtype=torch.uint8),
    }


def write(directory: Path, change: Callable[[dict[str, Tensor]], None] = lambda _: None) -> TensorFiles:
    stored = tensors()
    change(stored)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return TensorFiles(directory)


def error_of(act: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return str(caught.value)


@pytest.mark.parametrize("step_bytes", [1, 4096, 1 << 26])
def test_a_scan_returns_the_digest_of_each_file(
    tmp_path: Path, step_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soundness, "STEP_BYTES", step_bytes)
    digest = xxhash.xxh3_128_hexdigest
    files = write(tmp_path)
    assert soundness.scan(files) == {"model.safetensors": digest((tmp_path / "model.safetensors").read_bytes())}
    soundness.raise_if_sample_bad(files)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["head.weight", "wide.weight", "half.weight"])
@pytest.mark.parametrize("step_bytes", [64, 1 << 26])
def test_a_scan_names_tensor_place_and_number(
    bad: float, name: str, step_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        stored[name][2, 3] = bad
        stored[name][4, 1:5] = INF

    monkeypatch.setattr(soundness, "STEP_BYTES", step_bytes)
    files, kind = write(tmp_path, change), "NaN" if bad != bad else "Inf"
    expected = (
        f"{tmp_path / 'model.safetensors'}: {name}: {kind} at index [2, 3], the first of 5 values that are NaN or Inf."
        " The checkpoint is damaged. Fetch the file again."
    )
    assert error_of(lambda: soundness.scan(files)) == expected
    assert f"{name}: {kind} at index [2, 3], the first of 5 values" in error_of(
        lambda: soundness.raise_if_sample_bad(files)
    )


def test_all_damaged_tensors_are_named_together(tmp_path: Path) -> None:
    def change(stored: dict[str, Tensor]) -> None:
        stored["norm.weight"][7] = NAN
        stored["scalar"].fill_(INF)
        stored["down_proj_scales"][3, 5, 1] = 255

    message = error_of(lambda: soundness.scan(write(tmp_path, change)))
    assert message.startswith("3 problems:")
    for place in ("norm.weight: NaN at index [7].", "scalar: Inf at index [].", "row 5, block 1."):
        assert place in message
    assert "down_proj_scales: NaN (byte 255) at expert 3" in message


def test_bytes_of_blocks_are_not_scales(tmp_path: Path) -> None:
    soundness.scan(write(tmp_path, lambda stored: stored["down_proj_blocks"].fill_(255)))


def test_a_sample_sees_the_first_values_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "SAMPLED_VALUES", 100)
    files = write(tmp_path, lambda stored: stored["head.weight"].view(-1)[100:].fill_(NAN))
    soundness.raise_if_sample_bad(files)
    monkeypatch.setattr(soundness, "SAMPLED_VALUES", 130)
    message = error_of(lambda: soundness.raise_if_sample_bad(files))
    assert "head.weight: NaN at index [1, 36], the first of 30 values that are NaN or Inf of a sample." in message


def test_a_piece_is_checked_while_it_is_made(tmp_path: Path) -> None:
    files = write(tmp_path, lambda stored: stored["norm.weight"][7].fill_(NAN))
    for name in ("head.weight", "norm.weight"):
        made = Piece({name: TensorInfo("BF16", files.tensors[name].shape)}, lambda name=name: [step_of(files, name)])
        checked = soundness.add_checking(made, files)
        if name == "head.weight":
            (part,) = shards.make_parts([checked])
            assert torch.equal(part[1], tensors()[name])
        else:
            message = error_of(lambda checked=checked: list(shards.make_parts([checked])))
            assert re.search(r"norm.weight: NaN at index \[7\]", message)


def step_of(files: TensorFiles, name: str) -> Step:
    return Step(lambda: files.read(name), lambda values: [(name, values)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_position_is_seen(dtype: torch.dtype) -> None:
    for at in range(200):
        values = torch.full((200,), torch.finfo(dtype).max, dtype=dtype)
        assert find_non_finite(values) is None
        values[at] = NAN
        found = find_non_finite(values)
        assert found is not None and (found.count, found.first, found.kind) == (1, [at], "NaN")


def test_the_byte_254_is_a_number() -> None:
    assert find_nan_scales(torch.full((2, 2, 2), 254, dtype=torch.uint8)) is None
