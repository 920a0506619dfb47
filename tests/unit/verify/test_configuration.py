"""`verify` states config.json of an export on its own, and names every key that says something else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from pipeline import export_checkpoint, verify_checkpoint
from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.released import describe_missing_stop, raise_if_unfit, stop_problems, token_ids
from pipeline.checkpoints.side_files import GENERATION_CONFIG
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.export import EXPORTERS
from pipeline.export.mxfp4 import legacy_config
from pipeline.models.tiny_model import create_tiny
from pipeline.verify import check_files
from pipeline.verify.configuration import compare, expected_config

KEYS = (
    *("architectures", "attention_bias", "attention_dropout", "eos_token_id", "experts_per_token", "head_dim"),
    *("hidden_act", "hidden_size", "initial_context_length", "initializer_range", "intermediate_size", "layer_types"),
    *("max_position_embeddings", "model_type", "num_attention_heads", "num_experts_per_tok", "num_hidden_layers"),
    *("num_key_value_heads", "num_local_experts", "output_router_logits", "pad_token_id", "rms_norm_eps"),
    *("rope_scaling", "rope_theta", "router_aux_loss_coef", "sliding_window", "swiglu_limit", "tie_word_embeddings"),
    *("use_cache", "vocab_size"),
)
"""Keys of config.json that every target of the Hugging Face layout has."""
NOT_STATED = "transformers_version"
"""Key of the released models that does not affect the model."""
OWN_KEYS = {"mxfp4": {"quantization_config"}, "bf16": {"dtype"}, "nvfp4": {"quantization_config"}}
OTHER_VALUES: dict[type, Callable[[Any], Any]] = {
    bool: lambda value: not value,
    int: lambda value: value + 1,
    float: lambda value: value * 2 + 1,
    str: lambda value: f"{value}x",
    list: lambda value: value[1:],
    dict: lambda value: dict(list(value.items())[1:]),
}
ADDED = {"rope_parameters": {"rope_type": "yarn"}, "torch_dtype": "bfloat16", "load_in_4bit": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("configuration") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


@pytest.fixture(scope="module")
def exports(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {target: export_checkpoint(base, base, root / target, target=target) for target in OWN_KEYS}


@pytest.fixture
def problems(exports: dict[str, Path], base: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """A function that changes config.json of an export, and returns the problems of its files."""

    def find(target: str, change: Callable[[dict[str, Any]], object]) -> list[str]:
        copy = Path(shutil.copytree(exports[target], tmp_path / "export"))
        config = read_config(copy)
        change(config)
        (copy / CONFIG).write_text(json.dumps(config))
        return check_files(copy, target, Checkpoint(base)).problems

    return find


@pytest.mark.parametrize("target", OWN_KEYS)
def test_a_right_export_has_every_key_with_its_expected_value(
    target: str, exports: dict[str, Path], base: Path
) -> None:
    check = check_files(exports[target], target, Checkpoint(base))
    assert check.problems == []
    assert read_config(exports[target]).keys() == {*KEYS, *OWN_KEYS[target], NOT_STATED}
    assert {key.partition(".")[0] for key in check.stated} >= {*KEYS, *OWN_KEYS[target]}
    assert all(each["expected"] == each["found"] for each in check.stated.values())


@pytest.mark.parametrize("key", [*KEYS, "quantization_config"])
def test_a_key_with_another_value_is_named(key: str, problems: Callable[..., list[str]]) -> None:
    found = problems("mxfp4", lambda config: config.update({key: OTHER_VALUES[type(config[key])](config[key])}))
    assert any(f"{CONFIG}: {key}" in problem for problem in found), found


@pytest.mark.parametrize("key", [*KEYS, "quantization_config"])
def test_a_missing_key_is_named(key: str, problems: Callable[..., list[str]]) -> None:
    found = problems("mxfp4", lambda config: config.pop(key))
    assert any(f"{CONFIG}: {key} is missing, but must be" in problem for problem in found), found


@pytest.mark.parametrize("key", ADDED)
def test_a_key_that_the_released_models_lack_is_named(key: str, problems: Callable[..., list[str]]) -> None:
    found = problems("mxfp4", lambda config: config.update({key: ADDED[key]}))
    assert found and f"{CONFIG}: {key} is" in found[0] and "must be absent" in found[0]


@pytest.mark.parametrize(
    ("target", "key"), [("bf16", "dtype"), ("nvfp4", "quantization_config"), ("nvfp4", "architectures")]
)
def test_keys_of_other_targets_are_stated_too(target: str, key: str, problems: Callable[..., list[str]]) -> None:
    found = problems(target, lambda config: config.update({key: OTHER_VALUES[type(config[key])](config[key])}))
    assert any(f"{CONFIG}: {key}" in problem for problem in found), found


def test_a_writer_and_a_description_that_are_wrong_in_the_same_way_are_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**read_config(base), "architectures": ["FSDPGptOssForCausalLM"]}
    monkeypatch.setattr("pipeline.export.mxfp4.released_config", lambda config: wrong)
    out = export_checkpoint(base, base, tmp_path / "out")
    assert EXPORTERS["mxfp4"].describe(Checkpoint(base), ()) == wrong
    failed = [check.problems for check in verify_checkpoint(out, base) if check.status == "FAILED"]
    assert failed == [
        [f"{out / CONFIG}: architectures is ['FSDPGptOssForCausalLM'], but must be ['GptOssForCausalLM']"]
    ]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("generation_config.json", {"eos_token_id": 3}, "eos_token_id is [3], but must have"),
        ("generation_config.json", {"eos_token_id": None}, "eos_token_id is [None], but must have"),
    ],
)
def test_a_generation_config_without_the_end_of_an_answer_is_named_even_if_it_is_the_bases_own(
    name: str, change: dict[str, Any], expected: str, base: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(base, tmp_path / "base"))
    out = export_checkpoint(source, source, tmp_path / "out")
    for directory in (source, out):
        (directory / name).write_text(json.dumps(read_config(source, name) | change))
    (problem,) = check_files(out, "mxfp4", Checkpoint(source)).problems
    assert problem.startswith(f"{out / name}: {expected}")


def test_an_export_must_stop_at_tool_calls_if_the_base_does(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "own"))
    path, ids = own / GENERATION_CONFIG, token_ids(base)
    path.write_text(json.dumps({**read_config(own, GENERATION_CONFIG), "eos_token_id": [ids["<|return|>"]]}))
    out = export_checkpoint(base, base, tmp_path / "out")
    shutil.copyfile(path, out / GENERATION_CONFIG)
    wanted = f"eos_token_id is [{ids['<|return|>']}], but must have {ids['<|call|>']} (<|call|>), or generation goes on"
    (problem,) = check_files(out, "mxfp4", Checkpoint(base), {GENERATION_CONFIG: path}).problems
    assert problem.startswith(f"{out / GENERATION_CONFIG}: {wanted} after a tool call. Add it to the generation_config")
    remark = describe_missing_stop(own)
    assert remark is not None and remark.startswith(f"{path}: eos_token_id is") and "without <|call|>" in remark
    assert describe_missing_stop(base) is None and stop_problems(own) == [] and len(stop_problems(own, base)) == 1


@pytest.mark.parametrize("target", ["mxfp4", "bf16"])
@pytest.mark.parametrize("value", ["absent", None])
def test_every_configuration_that_is_let_in_gives_a_configuration_that_verify_accepts(
    value: str | None, target: str, base: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(base, tmp_path / "base"))
    whole, refused = read_config(base), set()
    for key in whole:
        config = {name: each for name, each in whole.items() if name != key} | ({} if value else {key: None})
        (source / CONFIG).write_text(json.dumps(config))
        try:
            Checkpoint(source).close()
            raise_if_unfit(source)
        except UserError:
            refused.add(key)
            continue
        checkpoint = Checkpoint(source)
        described = EXPORTERS[target].describe(checkpoint, checkpoint.tensors)
        wanted = expected_config(target, checkpoint.tensors, config, token_ids(source))
        assert [each.problem for each in compare(described, wanted) if each.problem] == [], key
        checkpoint.close()
    assert ("vocab_size" in refused and not {"architectures", "layer_types", "use_cache"} & refused) or value is None
    if value:
        assert not {"attention_bias", "hidden_act", "rms_norm_eps", "swiglu_limit", "tie_word_embeddings"} & refused


def test_the_values_of_absent_keys_are_those_that_transformers_takes() -> None:
    filled, defaults = legacy_config({"num_hidden_layers": 2}), GptOssConfig(num_hidden_layers=2)
    for key in ("attention_bias", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "layer_types"):
        assert filled[key] == getattr(defaults, key)


def test_an_export_without_a_chat_template_is_named_even_if_the_base_has_none(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "base"))
    (source / "chat_template.jinja").unlink()
    out = export_checkpoint(source, source, tmp_path / "out")
    (problem,) = check_files(out, "mxfp4", Checkpoint(source)).problems
    assert problem.startswith(f"{out}: has no chat template")


def test_a_left_over_index_in_an_export_is_named(exports: dict[str, Path], base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exports["bf16"], tmp_path / "export"))
    (weights,) = copy.glob("*.safetensors")
    weights.rename(copy / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = check_files(copy, "bf16", Checkpoint(base)).problems
    assert any("model.safetensors.index.json: lists files that are missing. Move it" in each for each in problems)
