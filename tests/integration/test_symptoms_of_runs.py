"""Warnings at the end of training, in whole runs: without effect and with few experts, and a healthy one."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, linked, run_program
from safetensors.torch import load_file, save_file

ROUTER = "model.layers.0.mlp.router.bias"


def warnings_of(stage: str, error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith(f"[{stage}] warning:")]


def test_training_without_effect_and_a_collapsed_router_are_reported(
    smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(next((smoke_run / "source").iterdir()), tmp_path / "source"))
    shard = next(path for path in source.glob("*.safetensors") if ROUTER in load_file(path))
    tensors = load_file(shard)
    tensors[ROUTER] = torch.linspace(1e4, 0, len(tensors[ROUTER])).bfloat16()  # the same experts win for every token
    save_file(tensors, shard, {"format": "pt"})
    own = (f"run_dir={tmp_path / 'run'}", f"model.path={source}", "sft.learning_rate=1e-15", "sft.max_steps=2")
    for stage in ("upcast", "sft"):
        assert run_program(f"stage={stage}", "recipe=smoke", *SHORT, *own) == 0
    told = "\n".join(warnings_of("sft", capsys.readouterr().err))
    assert "the validation loss stayed at" in told and "sft.learning_rate=1e-15 may be too low" in told
    assert "no token of the validation examples reached" in told and "Use more varied examples" in told


def test_healthy_training_gives_no_warning(smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft", "quantize")
    assert run_program("stage=qat", "recipe=smoke", *SHORT, f"run_dir={run}") == 0
    assert warnings_of("qat", capsys.readouterr().err) == []
