"""The configuration of a source is judged before any work begins, and left-over entries are reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.gpt_oss import plain_tensors
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.recognition import find_left_over, raise_if_other_layout
from pipeline.checkpoints.released import raise_if_unfit, rope_of
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models.tiny_model import create_tiny

Edit = Callable[[dict[str, Any]], object]
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("released") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


@pytest.fixture
def edited(tiny: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A function that copies the tiny model and edits its config.json."""

    def make(edit: Edit) -> Path:
        directory = Path(shutil.copytree(tiny, tmp_path / "copy"))
        config = read_config(directory)
        edit(config)
        (directory / CONFIG).write_text(json.dumps(config))
        return directory

    return make


def decode(directory: Path) -> None:
    """Replace the packed weights of a checkpoint by plain ones, and leave config.json as it is."""
    packed = Checkpoint(directory)
    tensors = {name: packed.read_plain(name) for name in plain_tensors(packed.shape)}
    for path in packed.weight_files():
        path.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def error_of(directory: Path) -> str:
    with pytest.raises(UserError) as raised:
        raise_if_unfit(directory)
    return str(raised.value)


def test_the_tiny_model_is_fit_and_nothing_is_left_over(tiny: Path) -> None:
    raise_if_unfit(tiny)
    assert find_left_over(tiny) == []


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda c: c.update(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06, but gpt-oss has 1e-05"),
        (lambda c: c.update(attention_bias=False), "attention_bias is False, but gpt-oss has True"),
        (lambda c: c.update(tie_word_embeddings=True), "tie_word_embeddings is True, but gpt-oss has False"),
        (lambda c: c.update(sliding_window="128"), "sliding_window='128': must be a positive whole number"),
        (lambda c: c.pop("max_position_embeddings"), "max_position_embeddings=None: must be a positive"),
        (lambda c: c.update(num_experts_per_tok=9, experts_per_token=9), "num_experts_per_tok=9 is more than"),
        (lambda c: c.update(experts_per_token=2), "experts_per_token=2, but num_experts_per_tok=4"),
        (lambda c: c["layer_types"].reverse(), "layer_types do not alternate"),
        (lambda c: c.pop("rope_scaling"), "rope_scaling and rope_parameters lack beta_fast, beta_slow, factor"),
        (lambda c: c["rope_scaling"].pop("truncate"), "rope_scaling and rope_parameters lack truncate, so"),
        (lambda c: c.pop("rope_theta"), "rope_scaling and rope_parameters lack rope_theta"),
        (lambda c: c["rope_scaling"].update(rope_type="linear"), "rope_type is 'linear', but gpt-oss has 'yarn'"),
        (
            lambda c: c.update(rope_parameters={**c["rope_scaling"], "factor": 16.0}),
            "rope_parameters.factor=16.0 and rope_scaling.factor=32.0 contradict each other. Some engines read",
        ),
        (
            lambda c: c.update(rope_parameters={"rope_theta": 10000.0}),
            "rope_parameters.rope_theta=10000.0 and rope_theta=150000 contradict each other",
        ),
        (
            lambda c: c["rope_scaling"].update(attention_factor=2.0),
            "rope_scaling.attention_factor is 2.0, but gpt-oss has no such key",
        ),
        (lambda c: c.update(eos_token_id=1), "eos_token_id is 1, but <|return|> has the id"),
        (lambda c: c.pop("pad_token_id"), "pad_token_id is None, not an id. Set it to the id of <|endoftext|>"),
        (lambda c: c.pop("quantization_config"), "has no quantization_config, but the experts are stored as MXFP4"),
    ],
)
def test_what_an_export_could_not_say_is_refused_at_once(
    edit: Edit, expected: str, edited: Callable[[Edit], Path]
) -> None:
    directory = edited(edit)
    assert error_of(directory).startswith(f"{directory / CONFIG}: {expected}")


def test_a_generation_config_without_the_end_of_an_answer_is_refused_at_once(edited: Callable[[Edit], Path]) -> None:
    directory = edited(lambda config: None)
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7]}))
    assert error_of(directory).startswith(f"{path}: eos_token_id is [7], but must have")


def test_both_rope_forms_may_be_there_if_they_agree(edited: Callable[[Edit], Path]) -> None:
    def add(config: dict[str, Any]) -> None:
        parameters = {**config["rope_scaling"], "factor": 32, "rope_theta": 150000.0, "partial_rotary_factor": 1.0}
        config.update(rope_parameters=parameters | {"attention_factor": None})

    raise_if_unfit(edited(add))


def test_all_problems_are_reported_together(edited: Callable[[Edit], Path]) -> None:
    message = error_of(edited(lambda config: config.update(rms_norm_eps=1, pad_token_id=None)))
    assert message.startswith("2 problems:")


def test_plain_weights_whose_config_says_mxfp4_are_refused(edited: Callable[[Edit], Path]) -> None:
    directory = edited(lambda config: None)
    decode(directory)
    assert "but they are stored as plain weights. Delete quantization_config" in error_of(directory)


def test_an_entry_of_another_tool_beside_plain_weights_is_reported_and_ignored(edited: Callable[[Edit], Path]) -> None:
    directory = edited(lambda config: None)
    decode(directory)
    config = {**read_config(directory), "quantization_config": BNB, "architectures": ["FSDPGptOssForCausalLM"]}
    (directory / CONFIG).write_text(json.dumps(config))
    raise_if_other_layout(directory)
    raise_if_unfit(directory)
    first, second = find_left_over(directory)
    assert "quantization_config ('bitsandbytes') is left over from another model" in first
    assert "architectures is ['FSDPGptOssForCausalLM']. Exports have ['GptOssForCausalLM']" in second


def test_an_entry_of_another_tool_without_weights_is_refused(edited: Callable[[Edit], Path]) -> None:
    directory = edited(lambda config: config.update(quantization_config=BNB))
    for path in directory.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="quantized with 'bitsandbytes', which cannot be trained"):
        raise_if_other_layout(directory)


def test_rope_settings_are_the_same_in_both_forms(tiny: Path) -> None:
    config = read_config(tiny)
    newer = {**config, "rope_parameters": {**config["rope_scaling"], "rope_theta": config["rope_theta"]}}
    del newer["rope_scaling"], newer["rope_theta"]
    assert rope_of(newer) == rope_of(config) == (config["rope_scaling"], 150000)
