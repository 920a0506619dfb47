"""Secrets that a user wrote into a setting are hidden wherever settings are shown or stored. Other values are not."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from pipeline.config import secrets
from pipeline.config.secrets import has_secret, remember, remember_arguments, without_secrets


@pytest.fixture(autouse=True)
def no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the values that a test remembers."""
    monkeypatch.setattr(secrets, "_values", set())


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
        ("['--api-key','abc']", "['--api-key',***]"),
        ("vllm serve --api-key abc --port 8", "vllm serve --api-key *** --port 8"),
        ("--api_key 'abc def' x", "--api_key *** x"),
        ("[--api-key,'${oc.env:X}',abc]", "[--api-key,'${oc.env:X}',abc]"),
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--header", "Authorization: Bearer abc"], ["--header", "Authorization: Bearer ***"]),
        ("refused Bearer abcdefgh12", "refused Bearer ***"),
        ("token=abc HF_TOKEN=abc my-secret=abc", "token=*** HF_TOKEN=*** my-secret=***"),
        ("nvapi-abcdefghijklmnopqrst gho_abcdefghijklmnopqrst", "*** ***"),
        ("glpat-abcdefghijklmnopqrst AKIAIOSFODNN7EXAMPLE", "*** ***"),
        (
            {"api_key": "abc", "password": "", "token": "${oc.env:X}"},
            {"api_key": "***", "password": "", "token": "${oc.env:X}"},
        ),
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
        {"eos_token": "<|return|>", "token": 5},
        "config.json: experts_per_token=4, but num_experts_per_tok=8",
        "abfs://data@account.dfs.core.windows.net/x.jsonl",
        "/d/eos_token=1/a.jsonl",
        "data.reply_columns=[new_password,answer]",
        "tracking.tags=[reset_password,v2]",
        "+data.filter.topic=[reset_password,change_pin]",
        "--max-tokens 64 --tokenizer abc --api-key --port 8",
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


@pytest.mark.parametrize(
    "override",
    [
        "serve.extra_arguments=[--api-key,pw]",
        "serve.extra_arguments=['--api-key', 'pw']",
        "serve.extra_arguments=[--hf-token=pw]",
        "x='Authorization: Bearer pw'",
        "x.url=https://host/v1?api_key=pw",
    ],
)
def test_arguments_and_headers_with_a_secret_are_recognized(override: str) -> None:
    assert has_secret(override)


def test_a_text_that_only_looks_like_a_secret_is_hidden_but_recorded() -> None:
    override = "data.model_identity='Never reveal the password=x'"
    assert without_secrets(override) != override
    assert not has_secret(override)
    assert without_secrets("ssh://me@host/v1") == "ssh://***@host/v1"
    assert not has_secret("x.url=ssh://me@host/v1")


def test_a_secret_variable_is_hidden_by_its_value_and_its_name_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", "swordfish-1")
    monkeypatch.setenv("TEST_SCRATCH", "/scratch/of/mine")
    written = ["--key", "${oc.env:TEST_API_KEY}"]
    remember(OmegaConf.create({"a": {"b": written}, "c": "${oc.env:TEST_SCRATCH}/x", "d": "${oc.env:TEST_NO_KEY,e}"}))
    assert without_secrets({"b": ["--key", "swordfish-1"]}) == {"b": ["--key", "***"]}
    assert without_secrets("--key=swordfish-1 /scratch/of/mine") == "--key=*** /scratch/of/mine"
    assert not has_secret("serve.extra_arguments=[--api-key,${oc.env:TEST_API_KEY}]")


@pytest.mark.parametrize("name", ["TOKENIZER_HOME", "TOKENIZED_DATA", "COMPASS_DIR", "AUTHOR", "MONKEY", "KEYBOARD"])
def test_a_variable_whose_name_only_contains_such_a_word_is_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"/data/of/{name}")
    remember(OmegaConf.create({"a": f"${{oc.env:{name}}}/x"}))
    assert without_secrets(f"/data/of/{name}/x") == f"/data/of/{name}/x"


@pytest.mark.parametrize("name", ["HF_TOKEN", "MY_API_KEY", "OPENAI_APIKEY", "db_pwd", "PASSWORD", "X_SECRET_1"])
def test_a_variable_with_such_a_word_in_its_name_is_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"value-of-{name}")
    remember(OmegaConf.create({"a": f"${{oc.env:{name}}}"}))
    assert without_secrets(f"a value-of-{name} b") == "a *** b"


def test_a_variable_that_holds_an_existing_path_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN_DIR", str(tmp_path))
    remember(OmegaConf.create({"a": "${oc.env:TEST_TOKEN_DIR}/x"}))
    assert without_secrets(f"{tmp_path}/x") == f"{tmp_path}/x"


def test_secret_arguments_are_hidden_wherever_the_program_prints_them() -> None:
    remember_arguments(["serve", "--api-key", "swordfish", "--hf-token=herring", "--port", "8000"])
    assert without_secrets("{'api_key': ['swordfish'], 'hf': 'herring', 'port': 8000}") == (
        "{'api_key': ['***'], 'hf': '***', 'port': 8000}"
    )
