"""The demonstration's base model: its files are whole, in the released layout, and small."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.released import raise_if_unfit
from pipeline.config import TinyConfig
from pipeline.errors import MachineError
from pipeline.models import demo_model
from pipeline.models.demo_model import FILES, RECORD, create_demo, name, read_digests
from pipeline.models.tiny_model import create_tiny


def test_the_model_is_a_checkpoint_in_the_released_layout(tmp_path: Path) -> None:
    create_demo(tmp_path / "demo")
    create_tiny(tmp_path / "tiny", TinyConfig())
    raise_if_unfit(tmp_path / "demo")
    checkpoint = Checkpoint(tmp_path / "demo")
    checkpoint.close()
    config, tiny = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("demo", "tiny"))
    assert list(config) == list(tiny) and config["quantization_config"] == tiny["quantization_config"]
    own = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {each for each in own if "safetensors" not in each} == {
        path.name for path in (tmp_path / "tiny").iterdir() if "safetensors" not in path.name
    }


def test_the_program_has_every_file_and_no_other() -> None:
    assert {path.name for path in FILES.iterdir()} == {*read_digests(), RECORD}
    assert sum(path.stat().st_size for path in FILES.iterdir()) < 2_000_000


@pytest.mark.parametrize("damage", ["other bytes", "missing"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    shutil.copytree(FILES, files)
    if damage == "missing":
        (files / "tokenizer.json").unlink()
    else:
        (files / "tokenizer.json").write_text("{}")
    with pytest.raises(MachineError, match=r"tokenizer\.json: missing or damaged\. Install the program again\."):
        create_demo(tmp_path / "demo", files)
    assert not (tmp_path / "demo").exists()


def test_another_model_has_another_name(tmp_path: Path) -> None:
    shutil.copytree(FILES, tmp_path / "files")
    assert name(tmp_path / "files") == name()
    (tmp_path / "files" / "config.json").write_text("{}")
    demo_model.write_record(tmp_path / "files", {})
    assert name(tmp_path / "files") != name()
