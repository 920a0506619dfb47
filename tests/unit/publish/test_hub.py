"""Uploads to a fake Hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import fake_hub
import huggingface_hub.constants
import pytest
from fake_hub import Hub

from pipeline.config import ExportConfig
from pipeline.errors import UserError
from pipeline.publish import hub as uploads

TOKEN = "hf_only_for_tests"
FILES = {"README.md": b"# Mine\n", "config.json": b"{}", "model.safetensors": bytes(range(256)) * 64}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub.running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_every_file_arrives_in_a_private_repository(hub: Hub, directory: Path) -> None:
    url = uploads.push(ExportConfig(push_to_hub="me/mine"), directory)
    assert url == f"{hub.url}/me/mine/commit/1"
    assert hub.files == FILES
    assert hub.is_private
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_an_upload_to_a_public_repository_needs_private_false(hub: Hub, directory: Path) -> None:
    hub.is_there = True
    with pytest.raises(UserError, match=r"export\.push_to_hub=me/mine: is public\. .*export\.private=false"):
        uploads.push(ExportConfig(push_to_hub="me/mine"), directory)
    assert hub.files == {}
    uploads.push(ExportConfig(push_to_hub="me/mine", private=False), directory)
    assert hub.files == FILES and not hub.is_private


def test_files_of_an_earlier_upload_are_deleted(hub: Hub, directory: Path) -> None:
    hub.is_there = hub.is_private = True
    hub.files = {"model-00002-of-00002.safetensors": b"old", ".gitattributes": b"*.safetensors filter=lfs"}
    uploads.push(ExportConfig(push_to_hub="me/mine"), directory)
    assert hub.files == FILES | {".gitattributes": b"*.safetensors filter=lfs"}


def test_a_refused_token_is_one_message_without_the_token(hub: Hub, directory: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match=r"export\.push_to_hub=me/mine: .*401.*hf auth login") as caught:
        uploads.push(ExportConfig(push_to_hub="me/mine"), directory)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_refused_metadata_is_one_message(hub: Hub, directory: Path) -> None:
    (directory / "README.md").write_text("---\nlicense: none of them\n---\n")
    hub.complaint = '"license" must be one of apache-2.0'
    with pytest.raises(UserError, match=r'Invalid metadata in README\.md.*"license" must be one of') as caught:
        uploads.push(ExportConfig(push_to_hub="me/mine"), directory)
    assert hub.files == {} and "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_message(hub: Hub, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the Hub cannot be reached or refuses"):
        uploads.push(ExportConfig(push_to_hub="me/mine"), directory)


def test_a_missing_or_private_repository_passes_the_check(hub: Hub) -> None:
    uploads.check(ExportConfig(push_to_hub="me/mine"))
    hub.is_there = hub.is_private = True
    uploads.check(ExportConfig(push_to_hub="me/mine"))
    assert hub.files == {}


def test_without_an_upload_the_hub_gets_no_request(hub: Hub) -> None:
    uploads.check(ExportConfig())
    assert hub.tokens == set()


def test_only_the_main_process_sends_requests_to_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    uploads.check(ExportConfig(push_to_hub="not a name"))
    assert hub.tokens == set()


def test_the_check_finds_a_public_repository(hub: Hub) -> None:
    hub.is_there = True
    with pytest.raises(UserError, match=r"export\.push_to_hub=me/mine: is public\. .*export\.private=false"):
        uploads.check(ExportConfig(push_to_hub="me/mine"))
    uploads.check(ExportConfig(push_to_hub="me/mine", private=False))


def test_the_check_finds_a_refused_token(hub: Hub) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match=r"export\.push_to_hub=me/mine: .*401.*hf auth login") as caught:
        uploads.check(ExportConfig(push_to_hub="me/mine"))
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


def test_the_check_finds_a_missing_token(logged_out: None) -> None:
    with pytest.raises(UserError, match=r"^export\.push_to_hub=me/mine: there is no token .* HF_TOKEN"):
        uploads.check(ExportConfig(push_to_hub="me/mine"))


def test_a_bad_name_and_a_missing_token_are_reported_together(logged_out: None) -> None:
    with pytest.raises(UserError) as caught:
        uploads.check(ExportConfig(push_to_hub="me/mine/too"))
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == ["export.push_to_hub=me/mine/too"] * 2


@pytest.mark.parametrize("name", ["me/mine/too", "a b/c", "-x/y", "me/x..y", "mine", ""])
def test_a_name_that_is_not_valid_on_the_hub_is_refused(name: str, hub: Hub) -> None:
    with pytest.raises(UserError, match=r"^export\.push_to_hub="):
        uploads.check(ExportConfig(push_to_hub=name))
    assert hub.tokens == set()
