"""Every mistake of the user ends in one message on stderr.

The message names the place and has no traceback. The exit status is 2.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_program
from safetensors.torch import load_file, save_file

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


@pytest.fixture(scope="session")
def upcast_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("upcast") / "run"
    assert run_program("stage=upcast", "recipe=smoke", f"run_dir={run_dir}") == 0
    return run_dir


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the program, which must end with status 2, and return its message."""
    capsys.readouterr()
    assert run_program(*arguments) == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    errors = [line for line in captured.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured
    return captured[captured.index("error: ") :]


def upcast_error(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, recipe: str = "smoke", *arguments: str
) -> str:
    run_dir = tmp_path / "run"
    settings = (f"recipe={recipe}", f"model.path={model}", f"run_dir={run_dir}")
    message = error_of(capsys, "stage=upcast", *settings, *arguments)
    assert not (run_dir / "upcast" / "artifact.json").exists()
    return message


def sft_error(capsys: pytest.CaptureFixture[str], upcast_run: Path, *arguments: str) -> str:
    message = error_of(capsys, "stage=sft", "recipe=smoke", f"run_dir={upcast_run}", "overwrite=true", *arguments)
    assert not (upcast_run / "sft" / "artifact.json").exists()
    return message


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def edit_tensors(model: Path, name: str, edit) -> None:
    """Apply `edit` to the tensors of the shard that holds `name`, and rewrite the shard."""
    shard = next(path for path in shards(model) if name in load_file(path))
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, {"format": "pt"})
    index_path = model / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    index_path.write_text(json.dumps(index))


BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.0.mlp.experts.gate_up_proj_scales"
DECODED_AND_PACKED = pytest.mark.parametrize("recipe", ["smoke", "smoke_lora"])


def test_no_such_model_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = upcast_error(capsys, tmp_path / "nowhere", tmp_path)
    assert f"{tmp_path / 'nowhere'}: no such directory" in message


def test_directory_without_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in upcast_error(capsys, tmp_path / "empty", tmp_path)


def test_another_architecture(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    message = upcast_error(capsys, model, tmp_path)
    assert "config.json: model_type is 'llama'" in message


def test_missing_shard(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    shard = shards(model)[1]
    shard.unlink()
    assert f"weight file {shard.name} is missing" in upcast_error(capsys, model, tmp_path)


def test_truncated_shard(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    shard = shards(model)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = upcast_error(capsys, model, tmp_path)
    assert str(shard) in message
    assert "truncated" in message


def test_shard_that_is_not_in_the_index(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    shutil.copyfile(shards(model)[0], model / "stale.safetensors")
    assert f"{model / 'stale.safetensors'}: lies beside the files in" in upcast_error(capsys, model, tmp_path)


def test_blocks_without_scales(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    edit_tensors(model, SCALES, lambda tensors: tensors.pop(SCALES))
    assert f"{BLOCKS} is there, but {SCALES} is missing" in upcast_error(capsys, model, tmp_path)


@DECODED_AND_PACKED
def test_scales_of_a_wrong_shape(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, recipe: str) -> None:
    edit_tensors(model, SCALES, lambda tensors: tensors.update({SCALES: tensors[SCALES][:, :-1].contiguous()}))
    message = upcast_error(capsys, model, tmp_path, recipe)
    assert f"tensor {SCALES} has shape [8, 191, 2], not [8, 192, 2]" in message


@DECODED_AND_PACKED
def test_blocks_that_do_not_fit_the_sizes_of_the_model(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, recipe: str
) -> None:
    edit_tensors(model, BLOCKS, lambda tensors: tensors.update({BLOCKS: tensors[BLOCKS][:, :, :1].contiguous()}))
    message = upcast_error(capsys, model, tmp_path, recipe)
    assert f"tensor {BLOCKS} has shape [8, 192, 1, 16], not [8, 192, 2, 16]" in message


@DECODED_AND_PACKED
def test_sizes_that_are_not_whole_blocks(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, recipe: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] + 8}))
    message = upcast_error(capsys, model, tmp_path, recipe)
    assert "intermediate_size=104 is not a multiple of 32, the block size of MXFP4" in message


@DECODED_AND_PACKED
def test_scale_that_is_nan(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, recipe: str) -> None:
    def put_nan(tensors: dict) -> None:
        tensors[SCALES][3, 5, 1] = 255

    edit_tensors(model, SCALES, put_nan)
    message = upcast_error(capsys, model, tmp_path, recipe)
    assert f"{SCALES}: NaN (byte 255) at expert 3, row 5, block 1" in message


def test_adapters_in_place_of_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapters" / "adapter_model.safetensors").touch()
    assert "adapters: holds adapters (adapter_config.json)" in upcast_error(capsys, tmp_path / "adapters", tmp_path)


def test_files_that_are_no_checkpoint_are_named_by_every_stage_that_reads_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    run = ("recipe=smoke", f"run_dir={tmp_path / 'run'}")
    for stage in ("upcast", "doctor", "all"):
        assert "model.gguf: holds GGUF" in error_of(capsys, f"stage={stage}", *run, f"model.path={gguf}")
        message = error_of(capsys, f"stage={stage}", *run, f"model.path={tmp_path / 'llama'}")
        assert "model_type is 'llama', not 'gpt_oss'" in message
    assert "export.source=" in error_of(capsys, "stage=export", *run, f"export.source={gguf}")


def test_tokenizer_without_a_chat_template(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    (model / "chat_template.jinja").unlink()
    assert "has no chat template" in upcast_error(capsys, model, tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not valid JSON"),
        (json.dumps({"text": "hi"}), "has no 'messages'"),
        (json.dumps({"messages": [{"role": "robot", "content": "hi"}]}), "unknown role 'robot'"),
        (json.dumps({"messages": [{"role": "user", "content": "hi"}]}), "has no assistant message"),
    ],
)
def test_bad_row_is_named(
    capsys: pytest.CaptureFixture[str], upcast_run: Path, tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps(ROW)] * 6 + [line]) + "\n")
    message = sft_error(capsys, upcast_run, f"data.path={path}")
    assert f"{path}: row 7: " in message
    assert reason in message


def test_rows_of_another_form_are_answered_with_a_command_that_works(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": f"Add {i}", "input": "to 1", "output": f"{i + 1}"} for i in range(30)]))
    run = ("stage=doctor", "recipe=smoke", f"model.path={tiny}", f"run_dir={tmp_path / 'run'}", "data.max_length=512")
    message = error_of(capsys, *run, "data=chat", f"data.path={path}")
    advice = message.partition("Use ")[2].strip().rstrip(".")
    assert advice == "data=alpaca"
    assert run_program(*run, advice, f"data.path={path}") == 0


def test_several_bad_rows_are_reported_together(
    capsys: pytest.CaptureFixture[str], upcast_run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("{broken\n" + json.dumps(ROW) + "\n" + json.dumps({"messages": 3}) + "\n")
    message = sft_error(capsys, upcast_run, f"data.path={path}")
    assert "2 problems" in message
    assert "row 1" in message
    assert "row 3" in message


def test_empty_data_set(capsys: pytest.CaptureFixture[str], upcast_run: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").touch()
    assert "the data set is empty" in sft_error(capsys, upcast_run, f"data.path={tmp_path / 'chat.jsonl'}")


def test_no_such_data_set(capsys: pytest.CaptureFixture[str], upcast_run: Path, tmp_path: Path) -> None:
    message = sft_error(capsys, upcast_run, f"data.path={tmp_path / 'chat.jsonl'}")
    assert f"data.path={tmp_path / 'chat.jsonl'}: no such file" in message


def test_validation_split_that_leaves_nothing(capsys: pytest.CaptureFixture[str], upcast_run: Path) -> None:
    message = sft_error(capsys, upcast_run, "data.max_samples=3")
    assert "data.validation_fraction=0.1 with 3 rows: no row is left to validate on" in message


def test_sequence_limit_that_truncates_every_supervised_token(
    capsys: pytest.CaptureFixture[str], upcast_run: Path
) -> None:
    assert "data.max_length=10 cuts off every supervised token" in sft_error(capsys, upcast_run, "data.max_length=10")


def test_corrected_mistake_needs_no_overwrite(capsys: pytest.CaptureFixture[str], upcast_run: Path) -> None:
    sft_error(capsys, upcast_run, "data.max_length=10")
    message = error_of(capsys, "stage=sft", "recipe=smoke", f"run_dir={upcast_run}", "data.max_length=11")
    assert "data.max_length=11 cuts off every supervised token" in message


def test_optimizer_whose_package_is_not_installed(
    capsys: pytest.CaptureFixture[str], upcast_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import trainer_optimizer

    monkeypatch.setattr(trainer_optimizer, "is_torchao_available", lambda: False)
    message = sft_error(capsys, upcast_run, "sft.optimizer=adamw_torch_8bit")
    assert "sft.optimizer=adamw_torch_8bit: " in message and "pip install torchao" in message


def test_layer_that_the_model_does_not_have(capsys: pytest.CaptureFixture[str], upcast_run: Path) -> None:
    message = sft_error(capsys, upcast_run, "train@sft=lora", "sft.lora.layers=[1,7]")
    assert "sft.lora.layers=[1, 7]: the model has the layers 0 to 1" in message
    message = sft_error(capsys, upcast_run, "train@sft=lora", "sft.lora.every_nth=3")
    assert "sft.lora.every_nth=3: the model has the layers 0 to 1" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "sdpa",
            "does not support an attention implementation through torch.nn.functional.scaled_dot_product_attention",
        ),
        pytest.param("flex_attention", "Attention sinks cannot be run on CPU with flex attention", marks=NO_GPU),
    ],
)
def test_attention_that_loses_the_sinks(
    capsys: pytest.CaptureFixture[str], upcast_run: Path, name: str, reason: str
) -> None:
    message = sft_error(capsys, upcast_run, f"sft.attn_implementation={name}")
    assert f"sft.attn_implementation={name}: transformers cannot train gpt-oss with this attention here (" in message
    assert reason in message


def test_optimizer_that_does_not_exist(capsys: pytest.CaptureFixture[str], upcast_run: Path) -> None:
    assert "adamw_torhc" in sft_error(capsys, upcast_run, "sft.optimizer=adamw_torhc")


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("recipe=smok", ("recipe=smok", "Did you mean 'smoke'?")),
        ("stage=sftt", ("stage", "sftt", "upcast")),
        ("format=mxfp5", ("format=mxfp5", "mxfp4")),
        ("sft.learning_rat=1", ("'sft.learning_rat'", "Did you mean 'sft.learning_rate'")),
        ("+sft.lr=1", ("sft.lr",)),
        ("sft.learning_rate=fast", ("sft.learning_rate", "fast")),
        ("data.validation_fraction=2", ("data.validation_fraction=2", "between 0 and 1")),
    ],
)
def test_mistake_on_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, argument: str, parts: tuple[str, ...]
) -> None:
    defaults = {"stage": "stage=sft", "recipe": "recipe=smoke", "run_dir": f"run_dir={tmp_path}"}
    defaults.pop(argument.partition("=")[0], None)
    message = error_of(capsys, *defaults.values(), argument)
    assert all(part in message for part in parts), message


def test_several_mistakes_on_the_command_line_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "stage=sft", "recipe=smok", "sft.learning_rat=1", "qat.max_steps=many")
    assert "3 problems" in message
    assert all(part in message for part in ("recipe=smok", "sft.learning_rat", "qat.max_steps"))


def test_missing_stage_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert "stage" in error_of(capsys, "recipe=smoke")


@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        ("sft", "upcast"),
        ("quantize", "sft"),
        ("qat", "quantize"),
        ("export", "upcast"),
        ("verify", "export/mxfp4"),
        ("evaluate", "upcast"),
        ("compare", "evaluate"),
    ],
)
def test_missing_input_names_the_stage_to_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, stage: str, needed: str
) -> None:
    message = error_of(capsys, f"stage={stage}", "recipe=smoke", f"run_dir={tmp_path}")
    assert f"stage={stage} needs {tmp_path / needed}, which is missing" in message
    assert f"python -m pipeline stage={needed.partition('/')[0]} recipe=smoke run_dir={tmp_path}" in message


def test_run_dir_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run_dir = tmp_path / "file" / "run"
    assert f"run_dir={run_dir}: cannot write" in error_of(capsys, "stage=upcast", "recipe=smoke", f"run_dir={run_dir}")


def test_verify_of_a_missing_directory(capsys: pytest.CaptureFixture[str], upcast_run: Path) -> None:
    message = error_of(
        capsys, "stage=verify", "recipe=smoke", f"run_dir={upcast_run}", "verify.checkpoint=/nowhere/export"
    )
    assert "verify.checkpoint=/nowhere/export: no such directory" in message


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("export.source=verify", "export.source=verify: must be one of upcast, sft, quantize, qat"),
        ("export.source=/nowhere", "export.source=/nowhere: neither a stage"),
        ("export.target=gguff", "export.target=gguff: no such choice. Did you mean 'gguf'?"),
    ],
)
def test_bad_export(capsys: pytest.CaptureFixture[str], upcast_run: Path, argument: str, part: str) -> None:
    assert part in error_of(capsys, "stage=export", "recipe=smoke", f"run_dir={upcast_run}", argument)
