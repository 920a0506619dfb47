"""Secrets that a user wrote into a setting do not reach a tracker. All other values do."""

import pytest

from pipeline.runs.trackers.secrets import without_secrets


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://me:pw@host/v1", "https://***@host/v1"),
        ("https://host/v1?a=1&api_key=pw&b=2", "https://host/v1?a=1&api_key=***&b=2"),
        (["--api-key", "pw", "--max-len", "8"], ["--api-key", "***", "--max-len", "8"]),
        (["--hf-token=pw"], ["--hf-token=***"]),
        ({"a": {"b": "http://me@host"}}, {"a": {"b": "http://***@host"}}),
    ],
)
def test_secrets_are_replaced(value: object, expected: object) -> None:
    assert without_secrets(value) == expected


@pytest.mark.parametrize(
    "value",
    ["openai/gpt-oss-20b", "https://host/v1?q=a@b", 3, None, 0.5, ["--max-num-seqs", "64"], {"max_new_tokens": 8}],
)
def test_other_values_do_not_change(value: object) -> None:
    assert without_secrets(value) == value
