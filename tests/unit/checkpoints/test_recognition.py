"""A path that is not a gpt-oss checkpoint is recognized, named and answered with what helps."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoints.config_json import CONFIG
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.recognition import describe_missing, raise_if_other_layout
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models.tiny_model import create_tiny

ORIGINAL = {"num_hidden_layers": 36, "num_experts": 128, "experts_per_token": 4, "initial_context_length": 4096}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("recognized") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


def directory_with(path: Path, **files: Any) -> Path:
    """Make a directory with files. `__` in a name stands for a dot. Dictionaries become JSON."""
    path.mkdir(parents=True)
    for name, content in files.items():
        file = path / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def error_of(directory: Path) -> str:
    """Return the message of opening a checkpoint. Checking it without weights must give the same message."""
    with pytest.raises(UserError) as caught:
        Checkpoint(directory)
    return str(caught.value).removeprefix(f"{directory}: ")


def error_without_weights(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        raise_if_other_layout(directory)
    return str(caught.value).removeprefix(f"{directory}: ")


def test_a_gguf_file_is_named(tmp_path: Path) -> None:
    for name in ("model.gguf", "model.data"):
        (tmp_path / name).write_bytes(b"GGUF\x03")
        message = describe_missing(str(tmp_path / name))
        assert message.startswith(
            "holds GGUF, the format of llama.cpp. These weights cannot be trained. Give a checkpoint"
        )
        assert message.endswith("model.path=openai/gpt-oss-20b.")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "model.data").write_bytes(b"")
    monkeypatch.setattr(Path, "open", refuse)
    message = describe_missing(str(tmp_path / "model.data"))
    assert message.startswith("is a file that cannot be read (Permission denied). Give a checkpoint in safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_a_model_directory_is_answered_with_the_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert describe_missing(str(tmp_path / name)).endswith(f"Give the directory that it is in: {tmp_path}.")


def test_the_name_of_a_released_model_without_its_owner_is_completed() -> None:
    assert describe_missing("gpt-oss-120b") == "no such directory. Did you mean openai/gpt-oss-120b?"
    assert describe_missing("/nowhere/gpt-oss-120b") == "no such directory."


def test_a_directory_with_gguf_alone_is_named(tmp_path: Path) -> None:
    found = error_without_weights(directory_with(tmp_path / "a", q4__gguf="GGUF"))
    assert found.startswith("holds only GGUF, the format of llama.cpp. These weights cannot be trained (q4.gguf).")


def test_gguf_beside_config_json_is_named(tiny: Path, tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "a", q4__gguf="GGUF")
    shutil.copy(tiny / CONFIG, directory)
    assert "Its weights are GGUF, the format of llama.cpp" in error_of(directory)


def test_weights_in_the_format_of_pytorch_are_named(tiny: Path, tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "a", pytorch_model__bin="PK")
    shutil.copy(tiny / CONFIG, directory)
    assert "Its weights are in PyTorch's format (pytorch_model.bin), not in safetensors. Load the" in error_of(
        directory
    )


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_adapters_are_answered_with_their_base_model(with_tokenizer: bool, tmp_path: Path) -> None:
    tokenizer = {"tokenizer__json": "{}"} if with_tokenizer else {}
    config = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}
    directory = directory_with(tmp_path / "a", adapter_config__json=config, **tokenizer)
    assert (
        error_of(directory)
        == error_without_weights(directory)
        == (
            "holds adapters (adapter_config.json), not a whole model. Give their base model (model.path=owner/base)."
            " This command merges and exports them: python -m pipeline stage=export model.path=owner/base"
            f" export.source={directory}"
        )
    )


def test_adapters_of_a_run_are_answered_with_the_command_that_merges_them(tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "sft", adapter_config__json={}, artifact__json={})
    command = f"python -m pipeline stage=export export.source={directory} export.target=bf16"
    assert error_of(directory).endswith(f"Merge them into their base model, and give the export: {command}")


def test_another_architecture_is_named(tmp_path: Path) -> None:
    message = error_of(directory_with(tmp_path / "a", config__json=LLAMA))
    assert "model_type is 'llama', not 'gpt_oss'. Use a gpt-oss checkpoint, such as model.path=openai/" in message


def test_the_original_layout_is_answered_with_the_root_of_the_repository(tiny: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny, tmp_path / "root"))
    directory = directory_with(root / "original", config__json=ORIGINAL)
    message = error_of(directory)
    assert message.startswith("holds OpenAI's original layout (names such as block.0.attn.qkv.weight)")
    assert message.endswith(f"Give the root of the repository: model.path={root}.")


@pytest.mark.parametrize("inside", [False, True])
def test_the_original_layout_alone_is_answered_with_the_download(inside: bool, tmp_path: Path) -> None:
    directory_with(tmp_path / "a" / "original", config__json=ORIGINAL)
    message = error_of(tmp_path / "a" if inside else tmp_path / "a" / "original")
    assert "Give model.path=openai/gpt-oss-120b, or fetch" in message
    assert "hf download openai/gpt-oss-120b --exclude 'original/*' --exclude 'metal/*' --local-dir" in message


def test_a_directory_around_the_model_is_answered_with_the_model(tiny: Path, tmp_path: Path) -> None:
    inner = tmp_path / "models--openai--gpt-oss-20b" / "snapshots" / "0123abcd"
    shutil.copytree(tiny, inner)
    for directory in (inner.parent, inner.parent.parent, tmp_path):
        assert error_of(directory).endswith(f"A directory in it is: model.path={inner}")


def test_a_tokenizer_alone_is_named(tmp_path: Path) -> None:
    directory = directory_with(tmp_path / "a", tokenizer__json="{}")
    assert error_of(directory).startswith("has no config.json and no weights, only a tokenizer. Fetch the whole")


def test_a_config_json_that_is_a_directory_is_named(tiny: Path, tmp_path: Path) -> None:
    directory = tmp_path / "a"
    shutil.copytree(tiny, directory)
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert error_of(directory).startswith("its config.json is a directory, not a file. Move the directory away")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "modelopt"])
def test_weights_that_another_tool_quantized_are_refused_at_once(method: str, tiny: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny, tmp_path / "a"))
    config = json.loads((directory / CONFIG).read_text()) | {"quantization_config": {"quant_method": method}}
    (directory / CONFIG).write_text(json.dumps(config))
    message = error_of(directory)
    assert message.startswith(
        f"config.json says that the weights are quantized with '{method}', which cannot be trained"
    )
    assert message.endswith("remove quantization_config from config.json.")


def test_a_good_checkpoint_is_not_refused(tiny: Path) -> None:
    raise_if_other_layout(tiny)
    Checkpoint(tiny).close()
