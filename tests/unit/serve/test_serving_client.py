"""Requests to an engine on this machine. A real local server answers the requests, answers late, or does not answer."""

import socket
from dataclasses import replace

import pytest
from chat_server import GOOD, Reply, Server

from pipeline.config import DataConfig, ServeConfig
from pipeline.evaluate.generation.replies import NoAnswerError, StatusError, UnexpectedReplyError
from pipeline.serve import client


@pytest.fixture
def settings() -> ServeConfig:
    return ServeConfig(answer_seconds=5.0)


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_an_engine_is_asked_directly_even_if_the_environment_names_a_proxy(
    server: Server, settings: ServeConfig, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port}")
    assert client.is_up(f"{server.url}/models")
    assert client.model_name(server.url, 5.0) == "tiny"
    assert client.ask(server.url, "tiny", settings, DataConfig()).answer == "5"


def test_an_engine_is_up_only_if_it_answers_200(server: Server, unused_port: int) -> None:
    assert client.is_up(f"{server.url}/models")
    for status in (204, 404, 503):
        server.models = Reply("", status)
        assert not client.is_up(f"{server.url}/models")
    assert not client.is_up(f"http://127.0.0.1:{unused_port}/health")


def test_an_engine_gets_no_key_and_no_second_attempt(
    server: Server, settings: ServeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-7")
    server.replies = [Reply("out of\n memory", 500), GOOD]
    with pytest.raises(StatusError) as caught:
        client.ask(server.url, "tiny", settings, DataConfig())
    assert str(caught.value) == f"{server.url}/chat/completions: status 500: out of memory"
    ((_, _, headers),) = server.asked
    assert "Authorization" not in headers


def test_an_engine_that_is_too_slow_is_an_error_that_names_the_setting(server: Server, settings: ServeConfig) -> None:
    settings.answer_seconds = 0.1
    server.replies = [replace(GOOD, after_seconds=1.0)]
    with pytest.raises(NoAnswerError, match=r"/v1/chat/completions: no answer within serve\.answer_seconds=0\.1$"):
        client.ask(server.url, "tiny", settings, DataConfig())


def test_an_engine_that_has_ended_is_an_error_with_its_address(unused_port: int) -> None:
    with pytest.raises(NoAnswerError, match=rf"^http://127\.0\.0\.1:{unused_port}/v1/models: .*refused"):
        client.model_name(f"http://127.0.0.1:{unused_port}/v1", 5.0)


@pytest.mark.parametrize("body", ["<html>", {"data": []}, {"data": [{}]}, {}, [], None])
def test_an_engine_that_names_no_model_is_an_error_with_its_reply(server: Server, body: object) -> None:
    server.models = Reply(body)
    with pytest.raises(UnexpectedReplyError, match="/v1/models: not what OpenAI's API promises"):
        client.model_name(server.url, 5.0)
