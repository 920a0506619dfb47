"""The committed script makes the demonstration's base: the same bytes each time, also after an interruption."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import TinyConfig
from pipeline.models.demo_model import FILES, RECORD, read_digests
from scripts import demo_pretraining
from scripts.demo_pretraining import Settings, describe_machine, make

SHORT = replace(
    Settings(),
    shape=TinyConfig(num_hidden_layers=1, num_experts_per_tok=2, sliding_window=128, vocab_size=1024),
    steps=4,
    decay_steps=1,
    grid_steps=2,
    warmup=1,
    batch=2,
    checkpoint_steps=1,
)


def test_the_script_makes_the_same_bytes_twice_and_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(SHORT, tmp_path / "first", tmp_path / "model")
    save = demo_pretraining._save

    def save_and_stop(*arguments: object) -> None:
        save(*arguments)  # type: ignore[arg-type]
        if arguments[-1] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(demo_pretraining, "_save", save_and_stop)
        make(SHORT, tmp_path / "second", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    make(SHORT, tmp_path / "second", tmp_path / "other")
    assert read_digests(tmp_path / "model") == read_digests(tmp_path / "other") != {}


@pytest.mark.slow
def test_the_script_makes_the_committed_model(tmp_path: Path) -> None:
    """On another kind of machine, or with other libraries, the bytes may differ."""
    record = json.loads((FILES / RECORD).read_text(encoding="utf-8"))
    if record["machine"] != describe_machine():
        pytest.skip(f"needs the machine of the record: {record['machine']}")
    make(Settings(), tmp_path / "work", tmp_path / "model")
    assert read_digests(tmp_path / "model") == read_digests(FILES)
