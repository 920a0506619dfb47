"""What users bring: models, adapters and paths that other programs, or other spellings, have made."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import SHORT, outcomes, run_program
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.gpt_oss import plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.side_files import copy_side_files
from pipeline.models import loading
from pipeline.runs import artifacts, console

LORA = ("recipe=smoke_lora", *SHORT, "sft.max_steps=2", "sft.eval_steps=2", "sft.save_steps=2", "data.max_samples=20")


def plain_copy(tiny: Path, directory: Path, noise: float = 0.0, **config: Any) -> Path:
    """Save the tiny model as a trainer saves it: plain weights in one file, and `config` in config.json."""
    source = Checkpoint(tiny)
    directory.mkdir()
    copy_side_files(tiny, directory)
    torch.manual_seed(0)
    tensors = {name: source.read_plain(name) for name in plain_tensors(source.shape)}
    tensors = {name: each + noise * each.std() * torch.randn_like(each) for name, each in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    kept = {key: value for key, value in source.config.items() if key != "quantization_config"}
    (directory / CONFIG).write_text(json.dumps({**kept, "torch_dtype": "bfloat16", **config}))
    return directory


def export_and_verify(run: Path, model: Path, source: Path) -> Path:
    arguments = ("recipe=smoke", f"run_dir={run}", f"model.path={model}", "verify.samples=1", "data.max_samples=40")
    assert run_program("stage=export", *arguments, f"export.source={source}") == 0
    assert run_program("stage=verify", *arguments) == 0
    return run / "export" / "mxfp4"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"architectures": ["FSDPGptOssForCausalLM"]}, "architectures is ['FSDPGptOssForCausalLM']"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "('bitsandbytes') is left over"),
    ],
)
def test_what_trainers_leave_in_config_json_does_not_reach_the_export(
    config: dict[str, Any], told: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = plain_copy(tiny, tmp_path / "model", **config)
    export = export_and_verify(tmp_path / "run", model, model)
    assert read_config(export) == read_config(tiny)
    shown = capsys.readouterr()
    assert told in shown.out
    assert "every weight of" in shown.err and "Was nothing trained" in shown.err


def test_a_source_that_could_not_be_exported_is_refused_before_the_training(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = plain_copy(tiny, tmp_path / "model", rms_norm_eps=1e-6)
    for stage in ("doctor", "upcast"):
        assert run_program(f"stage={stage}", "recipe=smoke", f"run_dir={tmp_path / 'run'}", f"model.path={model}") == 2
        assert "rms_norm_eps is 1e-06, but gpt-oss has 1e-05" in capsys.readouterr().err


def test_a_models_own_template_and_generation_config_are_exported_and_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = plain_copy(tiny, tmp_path / "model", noise=0.05)
    own = {"chat_template.jinja": (tiny / "chat_template.jinja").read_text() + "{# mine #}"}
    own["generation_config.json"] = json.dumps({**read_config(tiny, "generation_config.json"), "temperature": 0.6})
    for name, text in own.items():
        (model / name).write_text(text)
    export = export_and_verify(tmp_path / "run", tiny, model)
    assert {name: (export / name).read_text() for name in own} == own
    shown = capsys.readouterr()
    assert all(f"{name}: {model / name}, which differs from the base model's" in shown.out for name in own)
    assert "Was nothing trained" not in shown.err
    (export / "chat_template.jinja").write_text("other")
    arguments = ("recipe=smoke", f"run_dir={tmp_path / 'run'}", f"model.path={tiny}", "verify.samples=1")
    assert run_program("stage=verify", *arguments, "data.max_samples=40") == 1
    assert "chat_template.jinja: differs from the exported model's" in capsys.readouterr().out


def test_adapters_of_peft_are_exported_verified_and_evaluated(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=parameters)
    model = peft.get_peft_model(loading.load_plain(tiny, torch.bfloat16), settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path / "adapters"))
    export = export_and_verify(tmp_path / "run", tiny, tmp_path / "adapters")
    assert artifacts.load(export).details["moved_weights"] > 0.5
    assert outcomes(tmp_path / "run") == {"ok", "not checked"}  # adapters of PEFT have no digests
    assert "adapters: merged weights equal base + scaling * B A, recomputed" in capsys.readouterr().out
    arguments = (f"run_dir={tmp_path / 'run'}", f"model.path={tiny}", "evaluate.max_samples=2", "data.max_samples=40")
    arguments += ("stage=evaluate", "recipe=smoke", f"evaluate.source={tmp_path / 'adapters'}")
    assert run_program(*arguments) == 0, capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny / name, tmp_path / "adapters" / name)
    assert run_program(*arguments) == 0, capsys.readouterr().err
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second, *_ = sorted(vocabulary, key=vocabulary.get)[5:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "adapters" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert run_program(*arguments) == 2
    assert "tokenizer.json: the vocabulary of these adapters differs from" in capsys.readouterr().err


def test_a_model_is_known_by_its_contents_and_not_by_its_path(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "a" / "tiny")
    shutil.copytree(tiny, tmp_path / "another mount" / "tiny")
    (tmp_path / "a" / "link").symlink_to("tiny")
    monkeypatch.chdir(tmp_path / "a")
    spellings = ("tiny", "./tiny", "tiny/", "../a/tiny", "link", str(tmp_path / "a" / "tiny"))
    for path in (*spellings, f"'{tmp_path / 'another mount' / 'tiny'}'"):
        for stage in ("upcast", "sft"):
            status = run_program(f"stage={stage}", *LORA, f"run_dir={tmp_path / 'run'}", f"model.path={path}")
            assert status == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("up to date") == 2 * 6


def test_adapters_have_the_same_bytes_wherever_a_run_is(tiny: Path, tmp_path: Path) -> None:
    found = []
    for place in ("here", "far/away"):
        run = tmp_path / place
        for stage in ("upcast", "sft"):
            assert run_program(f"stage={stage}", *LORA, f"run_dir={run}", f"model.path={tiny}") == 0
        found.append(artifacts.load(run / "sft"))
        config = read_config(run / "sft", "adapter_config.json")
        assert (run / "sft" / config["base_model_name_or_path"]).resolve() == (run / "upcast").resolve()
        assert not any(str(tmp_path).encode() in path.read_bytes() for path in (run / "sft").glob("*.[mj]*"))
    assert found[0].fingerprint == found[1].fingerprint
    weights = [load_file(each.directory / "adapter_model.safetensors") for each in found]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_report_is_printed_on_streams_that_are_not_utf_8(
    encoding: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    console.let_streams_print()
    arguments = ("stage=doctor", "recipe=smoke", f"run_dir='{tmp_path}/naïve → 中'", f"model.path={tiny}")
    status = run_program(*arguments, "data.max_samples=10")
    for stream in streams.values():
        stream.flush()
    shown, told = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # type: ignore[attr-defined]
    assert status == 0, told
    assert "Traceback" not in told and "\\u4e2d" in shown


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_the_command_ends_with_its_message_on_streams_that_are_not_utf_8(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "pipeline", "stage=doctor", "run_dir='→ 中'", "nosuch=1"]
    ended = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert b"Traceback" not in ended.stderr and b"nosuch" in ended.stderr


@pytest.mark.parametrize("name", ["my model (1)", "a=b", "a,b", "it's", "[x]", "中 文", 'say "x"', "{y}", "a;b", "$x"])
def test_every_path_works_on_the_command_line_as_the_message_quotes_it(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / name))
    arguments = ("stage=upcast", "recipe=smoke", f"run_dir={tmp_path / 'run'}")
    if run_program(*arguments, f"model.path={model}") != 0:
        message = capsys.readouterr().err
        shown = message.rpartition("Put the value into quotes: ")[2].strip()
        assert shown, message
        (word,) = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert run_program(*arguments, word) == 0, capsys.readouterr().err
    assert artifacts.load(tmp_path / "run" / "upcast").base_model["path"] == str(model)
