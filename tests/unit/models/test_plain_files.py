"""Pickles with code are not loaded, and the message does not repeat PyTorch's advice to load them anyway."""

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import fake_quantizers
from pipeline.models.calibration import CALIBRATION_FILE, load_calibration
from pipeline.numerics.formats import MXFP4


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def restore_state(directory: Path) -> None:
    fake_quantizers.restore(torch.nn.Linear(2, 2), directory, MXFP4)


@pytest.fixture(params=[(CALIBRATION_FILE, load_calibration), (fake_quantizers.STATE_FILE, restore_state)])
def reader(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("protocol", [2, 4, "torch"])
def test_a_pickle_with_code_is_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any, protocol: int | str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    name, read = reader
    if isinstance(protocol, int):
        (tmp_path / name).write_bytes(pickle.dumps(Evil(), protocol))
    else:
        torch.save({"a": Evil()}, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            UserError, match=r"not a readable .* \(it is a pickle with code, which is not loaded"
        ) as caught:
            read(tmp_path)
    assert "weights_only" not in str(caught.value) and "issue" not in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04zz", b"\x80\x02}q\x00."])
def test_a_damaged_file_is_named(tmp_path: Path, reader: Any, content: bytes) -> None:
    name, read = reader
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not a readable "):
        read(tmp_path)
