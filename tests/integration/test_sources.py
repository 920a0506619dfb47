"""Test the inputs of a run: BF16 sources, exports from a directory, real text, and invalid weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, outcomes, run_program
from data_files import REAL_TEXT, needs_real_text
from run_files import source_of
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.gpt_oss import QUANTIZATION_CONFIG
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import copy_side_files
from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics

GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def change_weights(source: Path, target: Path, edit) -> Path:
    """Copy a plain checkpoint into one file, and apply `edit` to its tensors."""
    target.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif path.name not in {*artifacts.BOOKKEEPING, "model.safetensors.index.json"}:
            shutil.copyfile(path, target / path.name)
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_bf16_source_is_kept_byte_for_byte(smoke_run: Path, tmp_path: Path) -> None:
    source = change_weights(smoke_run / "upcast", tmp_path / "bf16", lambda tensors: None)
    run_dir = tmp_path / "run"
    assert run_program("stage=upcast", "recipe=smoke", f"model.path={source}", f"run_dir={run_dir}") == 0
    upcast = run_dir / "upcast"
    assert (upcast / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert artifacts.load(upcast).details["copied_tensors"] == len(Checkpoint(source).tensors)


def test_export_of_an_untouched_model_has_every_value_of_the_source(smoke_run: Path, tmp_path: Path) -> None:
    """The weights go from MXFP4 to BF16 and back to MXFP4. The export has the quantization config of the original."""
    source = change_weights(smoke_run / "upcast", tmp_path / "bf16", lambda tensors: None)
    arguments = ("recipe=smoke", f"model.path={source}", f"run_dir={tmp_path / 'run'}")
    for stage in ("upcast", "export"):
        assert run_program(f"stage={stage}", *arguments) == 0
    export, original = Checkpoint(tmp_path / "run" / "export"), Checkpoint(source_of(smoke_run))
    assert export.config == original.config
    assert export.config["quantization_config"] == QUANTIZATION_CONFIG
    assert export.tensors == original.tensors
    for name in Checkpoint(smoke_run / "upcast").tensors:
        assert torch.equal(export.read_plain(name), original.read_plain(name)), name
    assert run_program("stage=verify", *arguments) == 0
    assert outcomes(tmp_path / "run") == {"ok"}


def test_rope_settings_of_transformers_5_are_written_in_the_form_that_engines_read(
    smoke_run: Path, tmp_path: Path
) -> None:
    source = change_weights(smoke_run / "upcast", tmp_path / "bf16", lambda tensors: None)
    config = json.loads((source / "config.json").read_text())
    rope = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    (source / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    arguments = ("recipe=smoke", f"model.path={source}", f"run_dir={tmp_path / 'run'}")
    for stage in ("upcast", "export"):
        assert run_program(f"stage={stage}", *arguments) == 0
    assert Checkpoint(tmp_path / "run" / "export").config == Checkpoint(source_of(smoke_run)).config


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(smoke_run: Path, tmp_path: Path, capsys, bad: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[GATE_UP][5, 40, 17] = bad  # (E, in, out): input 40 lies in block 1 of row 17

    spoilt = change_weights(smoke_run / "upcast", tmp_path / "spoilt", spoil)
    run_dir = tmp_path / "run"
    arguments = ("recipe=smoke", f"run_dir={run_dir}", f"model.path={source_of(smoke_run)}")
    assert run_program("stage=export", *arguments, f"export.source={spoilt}") == 2
    message = capsys.readouterr().err
    assert f"{GATE_UP}: expert 5, row 17, block 1" in message
    assert not (run_dir / "export" / "artifact.json").exists()


def test_an_input_dimension_that_is_no_multiple_of_32_is_named(tmp_path: Path, smoke_run: Path, capsys) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(smoke_run / "upcast")
    config.intermediate_size = 40
    odd = tmp_path / "odd"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(odd)
    copy_side_files(source_of(smoke_run), odd)
    arguments = ("recipe=smoke", f"run_dir={tmp_path / 'run'}", f"model.path={odd}")
    assert run_program("stage=export", *arguments, f"export.source={odd}") == 2
    message = capsys.readouterr().err
    assert "model.layers.0.mlp.experts.down_proj: expert 0, block 1" in message
    assert "not a multiple of 32" in message


@needs_real_text
def test_a_run_on_real_multilingual_text_learns(tmp_path: Path) -> None:
    arguments = ("recipe=smoke", f"run_dir={tmp_path}", f"data.path={REAL_TEXT}", "data.max_length=1024")
    assert run_program("stage=upcast", *arguments) == 0
    assert run_program("stage=sft", *arguments, *SHORT) == 0
    details = artifacts.load(tmp_path / "sft").details
    assert details["train_examples_cut"] == 0
    assert details["validation_loss"] < 0.8 * details["validation_loss_before"]
    assert len(read_metrics(tmp_path / "sft")) > 6


def test_a_run_validates_on_rows_of_its_own_and_is_stale_when_they_change(tmp_path: Path, capsys) -> None:
    def write(name: str, numbers: range) -> Path:
        rows = [{"question": f"What is {i} + 1?", "answer": f"{i + 1}", "kind": str(i % 2)} for i in numbers]
        (tmp_path / name).write_text(json.dumps(rows))
        return tmp_path / name

    train, own = write("train.json", range(40)), write("own.json", range(37, 47))
    arguments = ("recipe=smoke", f"run_dir={tmp_path / 'run'}", "data=prompt_completion", f"data.path={train}")
    arguments += ("data.columns.prompt=question", "data.columns.completion=answer", "data.max_length=512")
    arguments += (f"data.validation.path={own}", "evaluate.group_column=kind", *SHORT)
    assert run_program("stage=doctor", *arguments) == 0
    shown = capsys.readouterr()
    assert "50, of which 40 are trained on and 10 validate" in shown.out
    assert f"10 of {own} (train): 10 examples, " in " ".join(shown.out.split())
    assert "3 validation prompts also in training" in shown.out
    assert "Remove them from data.validation, or from the training rows." in " ".join(shown.err.split())
    for stage in ("upcast", "sft", "evaluate"):
        assert run_program(f"stage={stage}", *arguments) == 0, capsys.readouterr().err
    assert "3 of 10 rows of data.validation have a prompt that is also in the training rows" in capsys.readouterr().err
    assert artifacts.load(tmp_path / "run" / "sft").details["validation_rows"] == 10
    write("own.json", range(50, 60))
    assert run_program("stage=sft", *arguments) == 2
    assert "the data set's contents: fingerprint was" in capsys.readouterr().err


def test_a_model_of_another_shape_than_the_source_is_not_exported(tmp_path: Path, smoke_run: Path, capsys) -> None:
    arguments = ("recipe=smoke", f"run_dir={tmp_path / 'run'}", "model.tiny.num_hidden_layers=3")
    assert run_program("stage=export", *arguments, f"export.source={smoke_run / 'upcast'}") == 2
    message = capsys.readouterr().err
    assert "num_hidden_layers=2" in message
    assert "num_hidden_layers=3" in message
