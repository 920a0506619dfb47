"""Secrets that a user wrote into a setting are hidden wherever settings are shown or stored. Other values are not."""

import pytest
from omegaconf import OmegaConf

from pipeline.config.secrets import has_secret, remember, without_secrets


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://me:pw@host/v1", "https://***@host/v1"),
        ("https://host/v1?a=1&api_key=pw&b=2", "https://host/v1?a=1&api_key=***&b=2"),
        (["--api-key", "pw", "--max-len", "8"], ["--api-key", "***", "--max-len", "8"]),
        (["--hf-token=pw"], ["--hf-token=***"]),
        ("serve.extra_arguments=[--api-key,pw,--x]", "serve.extra_arguments=[--api-key,***,--x]"),
        ("token hf_abcdefghijklmnopqrst refused", "token *** refused"),
        ({"a": {"b": "http://me@host"}}, {"a": {"b": "http://***@host"}}),
    ],
)
def test_secrets_are_replaced(value: object, expected: object) -> None:
    assert without_secrets(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "openai/gpt-oss-20b",
        "hf_my_data_set_of_chats.jsonl",
        "https://host/v1?q=a@b",
        3,
        None,
        0.5,
        ["--max-num-seqs", "64"],
        {"max_new_tokens": 8},
    ],
)
def test_other_values_do_not_change(value: object) -> None:
    assert without_secrets(value) == value


@pytest.mark.parametrize(
    "override",
    ["x.api_key_env=hf_abcdefghijklmnopqrstuvwx", "x=sk-abcdefghijklmnopqrst", "x.url=http://me:secret@host/v1"],
)
def test_tokens_and_passwords_are_recognized(override: str) -> None:
    assert has_secret(override)
    assert not has_secret("model.path=openai/gpt-oss-20b") and not has_secret("x.url=http://host:8000/v1")


def test_a_secret_variable_is_hidden_by_its_value_and_its_name_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", "swordfish-1")
    monkeypatch.setenv("TEST_SCRATCH", "/scratch/of/mine")
    written = ["--key", "${oc.env:TEST_API_KEY}"]
    remember(OmegaConf.create({"a": {"b": written}, "c": "${oc.env:TEST_SCRATCH}/x", "d": "${oc.env:TEST_NO_KEY,e}"}))
    assert without_secrets({"b": ["--key", "swordfish-1"]}) == {"b": ["--key", "***"]}
    assert without_secrets("--key=swordfish-1 /scratch/of/mine") == "--key=*** /scratch/of/mine"
    assert not has_secret("serve.extra_arguments=[--api-key,${oc.env:TEST_API_KEY}]")
