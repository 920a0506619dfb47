"""Ids on the Hub are distinguished from paths."""

from pathlib import Path

import pytest

from pipeline.config import hub_ids

# path -> (whether it is the id of a model, whether it is the id of a data set)
RULE: dict[str | None, tuple[bool, bool]] = {
    # owner/name
    "openai/gpt-oss-20b": (True, True),
    "HuggingFaceH4/Multilingual-Thinking": (True, True),
    "a_b/c.d-e": (True, True),
    "0/1": (True, True),
    # a bare name: a data set may have no owner
    "squad": (False, True),
    "gpt2": (False, True),
    # paths
    "/data/chats": (False, False),
    "./data/chats": (False, False),
    "../chats": (False, False),
    "./chats": (False, False),
    "~/chats": (False, False),
    "~": (False, False),
    ".": (False, False),
    "a/b/c": (False, False),
    "a/": (False, False),
    "squad/": (False, False),
    "/squad": (False, False),
    "a//b": (False, False),
    "synthetic://tiny": (False, False),
    "https://huggingface.co/openai": (False, False),
    # data files
    "chats.jsonl": (False, False),
    "data/chats.jsonl": (False, False),
    "data/chats.parquet": (False, False),
    # characters and lengths that huggingface_hub does not allow
    "my chats/2024": (False, False),
    "owner/café": (False, False),
    "owner/.hidden": (False, False),
    "-owner/name": (False, False),
    "owner/name-": (False, False),
    "owner/a--b": (False, False),
    "owner/a..b": (False, False),
    "owner/name.git": (False, False),
    f"owner/{'a' * 97}": (False, False),
    "owner/name\n": (False, False),
    "": (False, False),
    None: (False, False),
}


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("path", "expected"), RULE.items())
def test_ids_of_the_hub_are_told_from_paths(path: str | None, expected: tuple[bool, bool]) -> None:
    assert (hub_ids.is_hub_id(path), hub_ids.is_hub_id(path, needs_owner=False)) == expected


@pytest.mark.parametrize("name", ["my/chats", "squad"])
def test_a_path_that_exists_is_no_hub_id_whatever_its_name(name: str) -> None:
    assert hub_ids.is_hub_id(name, needs_owner=False)
    Path(name).mkdir(parents=True)
    assert not hub_ids.is_hub_id(name, needs_owner=False)
    assert not hub_ids.is_hub_id(name)


def test_the_reason_why_a_name_is_not_allowed_is_one_line() -> None:
    reason = hub_ids.problem("owner/a--b")
    assert reason is not None and "owner/a--b" in reason and "\n" not in reason
    assert hub_ids.problem("owner/name") is None
