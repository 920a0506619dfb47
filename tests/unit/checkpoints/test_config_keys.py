"""Each key of config.json with a value of a wrong kind is refused, before anything is made of it."""

import json
from typing import Any

import pytest

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import TinyConfig
from pipeline.errors import UserError
from pipeline.models import tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.create_tiny(directory, TinyConfig())
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


WRONG = {"text": "x", "list": [[]], "negative": -1, "half": 1.5, "huge": 10**30, "nan": float("nan"), "truth": True}
MAY_BE = {  # kinds that are right for a key
    **dict.fromkeys(("num_hidden_layers", "hidden_size", "model_type", "quantization_config", "rope_scaling"), ()),
    **dict.fromkeys(("output_router_logits", "use_cache", "attention_bias"), ("truth",)),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "router_aux_loss_coef", "swiglu_limit"), ("half", "huge")),
    "initializer_range": ("half", "huge"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_every_key_refuses_values_of_the_wrong_kind(kind: str, config: dict[str, Any]) -> None:
    accepted = [key for key in config if not refuses({**config, key: WRONG[kind]})]
    assert accepted == [key for key in config if kind in MAY_BE.get(key, ())]


def refuses(config: dict[str, Any]) -> bool:
    try:
        Shape.of(config, "config.json")
    except UserError as error:
        assert str(error).startswith(("config.json: ", "2 problems"))
        return True
    return False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most 4096."),
        ({"num_local_experts": 10**9}, "num_local_experts=1000000000: must be at most 16384."),
        ({"hidden_size": 10**9}, "hidden_size=1000000000: must be at most 1048576."),
        (
            {"num_experts_per_tok": 9},
            "num_experts_per_tok=9: a token cannot choose more than num_local_experts=8 experts.",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads=4: must be a multiple of num_key_value_heads=3."),
        ({"head_dim": 31}, "head_dim=31: must be even, because RoPE turns pairs."),
        ({"layer_types": ["full_attention"]}, "layer_types: has 1 layers, but num_hidden_layers=2."),
        (
            {"layer_types": ["x", "x"]},
            "layer_types=['x', 'x']: must be a list of sliding_attention and full_attention.",
        ),
        ({"rope_scaling": {"factor": "x"}}, "rope_scaling.factor='x': must be a number, 1 or more."),
        ({"attention_bias": False}, "attention_bias=False: must be true, because gpt-oss has these biases."),
        (
            {"tie_word_embeddings": True},
            "tie_word_embeddings=True: must be false, because gpt-oss has its own lm_head.",
        ),
        ({"dtype": []}, "dtype=[]: must be the name of a type, such as bfloat16."),
        ({"eos_token_id": ["x"]}, "eos_token_id=['x']: must be a token id, a list of token ids, or null."),
    ],
)
def test_wrong_value_is_named(change: dict[str, Any], message: str, config: dict[str, Any]) -> None:
    with pytest.raises(UserError) as error:
        Shape.of({**config, **change}, "config.json")
    assert str(error.value) == f"config.json: {message}"


def test_several_wrong_values_are_reported_together(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="2 problems") as error:
        Shape.of({**config, "rope_theta": None, "use_cache": "yes"}, "config.json")
    assert error.value.count == 2
