"""Requests to a real local server with OpenAI's API. It answers correctly, late, wrongly or not at all."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_server import GOOD, Reply, Server, completion

from pipeline.config import EndpointApi, EndpointConfig, GenerationConfig, InstructionsRole
from pipeline.data.conversations import Conversation
from pipeline.errors import UserError
from pipeline.evaluate.generation import chat, client
from pipeline.evaluate.generation.endpoint import Served, ask, find
from pipeline.evaluate.generation.journal import GENERATIONS, Journal
from pipeline.evaluate.generation.prompts import Prompt, Question, questions
from pipeline.evaluate.transcripts import Transcript

SETTINGS = GenerationConfig(max_new_tokens=7)
KEY = "sk-secret-7"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat requests without a pause."""
    monkeypatch.setattr(client, "_FIRST_WAIT_SECONDS", 0.001)


def questions_of(*texts: str) -> list[Question]:
    made = [Conversation([{"role": "user", "content": text}], None, "low", where=f"row {text}") for text in texts]
    return questions([Prompt(f"id-{text}", made[i], {"answer": text}) for i, text in enumerate(texts)], 1)


Answer = Callable[..., list[Transcript]]


@pytest.fixture
def answers(server: Server, tmp_path: Path) -> Answer:
    """A function that asks the server, and returns the answers in the journal."""

    def of(wanted: list[Question], generation: GenerationConfig = SETTINGS, **settings: Any) -> list[Transcript]:
        configured = EndpointConfig(**{"url": server.url, "timeout_seconds": 5.0, **settings})
        journal: Journal[Transcript] = Journal(tmp_path, {})
        served = Served("endpoint", server.url, "tiny", "chat")
        pairs: list[tuple[Question, list[int]]] = [(question, []) for question in wanted]
        ask(served, pairs, journal, endpoint=configured, settings=generation)
        return [journal[question.key] for question in wanted]

    return of


def error_of(answers: Answer, wanted: list[Question], **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        answers(wanted, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- requests and replies --------------------------------------------------------------------------------------------


def test_answers_arrive_where_an_event_loop_runs_as_in_a_notebook(answers: Answer, server: Server) -> None:
    async def cell() -> list[Transcript]:
        return answers(questions_of("a", "b"), model=None)

    assert [each.answer for each in asyncio.run(cell())] == [each.answer for each in answers(questions_of("a", "b"))]


def test_a_mistake_is_raised_where_an_event_loop_runs(answers: Answer) -> None:
    async def cell() -> str:
        return error_of(answers, questions_of("a"), url="http://127.0.0.1:9", timeout_seconds=0.2)

    assert "127.0.0.1:9" in asyncio.run(cell())


def test_the_servers_only_model_is_used_if_none_is_named(server: Server) -> None:
    assert find(EndpointConfig(url=server.url)) == Served("endpoint", server.url, "tiny")
    assert server.asked[0][0] == "/v1/models"


def test_a_named_model_needs_no_request(server: Server) -> None:
    assert find(EndpointConfig(url=server.url + "/", name="vllm", model="m")) == Served("vllm", server.url, "m")
    assert server.asked == []


def test_v1_is_appended_to_an_address_without_a_path(server: Server) -> None:
    assert find(EndpointConfig(url=server.url.removesuffix("/v1"))).url == server.url


@pytest.mark.parametrize(("names", "told"), [(["a", "b"], "has several models (a, b)"), ([], "names no model")])
def test_several_models_or_none_are_an_error_that_names_them(server: Server, names: list[str], told: str) -> None:
    server.models = Reply({"data": [{"id": name} for name in names]})
    with pytest.raises(UserError) as caught:
        find(EndpointConfig(url=server.url))
    assert told in str(caught.value) and "evaluate.endpoint.model=<name>" in str(caught.value)


def test_a_request_follows_the_settings(server: Server, answers: Answer) -> None:
    answers(questions_of("a"))
    assert server.asked[0][0] == "/v1/chat/completions"
    assert server.bodies() == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "reasoning_effort": "low",
            "max_tokens": 7,
            "temperature": 0.0,
            "top_p": 1.0,
        }
    ]


@pytest.mark.parametrize("of_row", ["system", "developer"])
def test_instructions_are_sent_with_the_role_that_all_engines_render_as_instructions(
    of_row: str, server: Server, answers: Answer
) -> None:
    messages = [{"role": of_row, "content": "Be brief."}, {"role": "user", "content": "a"}]
    answers([Question(Prompt("id", Conversation(messages), {}), 0)])
    sent = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert server.bodies()[0]["messages"] == sent
    body = chat.request("m", Question(Prompt("id", Conversation(messages), {}), 0), [], SETTINGS, "system")
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


def test_each_sample_has_its_own_seed_which_is_stored(server: Server, answers: Answer) -> None:
    drawn = replace(SETTINGS, temperature=0.7, samples=2)
    both = questions([questions_of("a")[0].prompt], 2)
    found = answers(both, drawn)
    assert {each.seed for each in found} == {body["seed"] for body in server.bodies()}
    assert [each.seed for each in found] == [question.seed(drawn.seed) for question in both]
    assert len({each.seed for each in found}) == 2


def test_tools_and_calls_are_sent_in_the_apis_form(server: Server, answers: Answer) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    answers([Question(Prompt("id", Conversation(messages, tools, "low"), {}), 0)])
    sent = server.bodies()[0]
    assert sent["tools"] == tools
    (made,) = sent["messages"][1]["tool_calls"]
    assert made["function"] == {"name": "add", "arguments": '{"a": 2}'}
    assert sent["messages"][2] == {"role": "tool", "content": "5", "tool_call_id": made["id"]}


def test_a_result_of_an_earlier_call_is_sent_with_the_id_of_its_call(server: Server, answers: Answer) -> None:
    calls = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": n, "arguments": {}}}],
        }
        for n in ("one", "two")
    ]
    results = [{"role": "tool", "content": "1", "name": "one"}, {"role": "tool", "content": "2"}]
    answers([Question(Prompt("id", Conversation([{"role": "user", "content": "?"}, *calls, *results]), {}), 0)])
    _, one, two, first, second = server.bodies()[0]["messages"]
    assert [first["tool_call_id"], second["tool_call_id"]] == [one["tool_calls"][0]["id"], two["tool_calls"][0]["id"]]


def test_text_before_an_answer_is_sent_before_it(server: Server, answers: Answer) -> None:
    answer = {"role": "assistant", "content": "Eight.", "preamble": "I look."}
    asked = [{"role": "user", "content": "?"}, answer, {"role": "user", "content": "?"}]
    answers([Question(Prompt("id", Conversation(asked), {}), 0)])
    assert server.bodies()[0]["messages"][1]["content"] == "I look.\nEight."


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_both_of_its_names(server: Server, answers: Answer, name: str) -> None:
    server.replies = [Reply(completion(**{name: "so"}))]
    (found,) = answers(questions_of("a"))
    assert found == Transcript(
        "id-a", 0, [{"role": "user", "content": "a"}], {"answer": "a"}, "so", "5", None, "stop", 3, None
    )


@pytest.mark.parametrize("content", [None, ""])
def test_a_missing_answer_is_none(server: Server, answers: Answer, content: Any) -> None:
    server.replies = [Reply(completion(content, "length", reasoning="so far", reasoning_content=None))]
    (found,) = answers(questions_of("a"))
    assert (found.answer, found.reasoning, found.finish) == (None, "so far", "length")


def test_tool_calls_are_read(server: Server, answers: Answer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{a:"}}
    server.replies = [Reply(completion(None, "tool_calls", tool_calls=[call]))]
    assert answers(questions_of("a"))[0].tool_calls == [{"name": "add", "arguments": "{a:"}]


def test_half_of_a_surrogate_pair_does_not_stop_the_file(server: Server, answers: Answer) -> None:
    server.replies = [Reply(completion("\ud83d ok"))]
    assert answers(questions_of("a"))[0].answer == "? ok"


def test_concurrent_requests_are_limited(server: Server, answers: Answer) -> None:
    server.replies = [replace(GOOD, after_seconds=0.1)]
    assert len(answers(questions_of(*"abcdefghi"), concurrency=3)) == 9
    assert server.most_busy == 3


# --- temporary failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_that_fails_is_asked_again(server: Server, answers: Answer, status: int) -> None:
    server.replies = [Reply("oops", status), Reply("oops", status), GOOD]
    assert answers(questions_of("a"))[0].answer == "5"
    assert len(server.asked) == 3


def test_a_slow_answer_is_asked_for_again(server: Server, answers: Answer) -> None:
    server.replies = [replace(GOOD, after_seconds=2.0), GOOD]
    assert answers(questions_of("a"), timeout_seconds=0.3)[0].answer == "5"
    assert len(server.asked) == 2


def test_each_repetition_waits_longer(server: Server, answers: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_WAIT_SECONDS", 0.02)
    server.replies = [Reply("oops", 500)] * 3 + [GOOD]
    answers(questions_of("a"))
    waits = [later - earlier for earlier, later in zip(server.at, server.at[1:], strict=False)]
    assert len(waits) == 3
    assert all(wait >= at_least for wait, at_least in zip(waits, (0.02, 0.04, 0.08), strict=True))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between requests, in seconds. The client does not wait. The shortest Retry-After would take a second."""
    found: list[float] = []

    async def note(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(client, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": note}))
    return found


def test_retry_after_is_heeded_in_seconds(server: Server, answers: Answer, pauses: list[float]) -> None:
    server.replies = [Reply("busy", 429, {"Retry-After": "7"}), GOOD]
    assert answers(questions_of("a"), timeout_seconds=100)[0].answer == "5"
    assert pauses == [7]


def test_retry_after_is_heeded_as_a_date(server: Server, answers: Answer, pauses: list[float]) -> None:
    until = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=50), usegmt=True)  # whole seconds
    server.replies = [Reply("busy", 503, {"Retry-After": until}), GOOD]
    assert answers(questions_of("a"), timeout_seconds=100)[0].answer == "5"
    assert 20 < pauses[0] <= 50


def test_an_invalid_retry_after_is_ignored(server: Server, answers: Answer) -> None:
    server.replies = [Reply("busy", 429, {"Retry-After": "soon"}), GOOD]
    assert answers(questions_of("a"))[0].answer == "5"


# --- permanent failures ----------------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_one_error(tmp_path: Path) -> None:
    settings = EndpointConfig(url="http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(UserError) as caught:
        find(settings)
    message = str(caught.value)
    assert message.startswith("evaluate.endpoint.url=http://127.0.0.1:9/v1: the server's list of models did not come")
    assert "in 2 attempts" in message and "Is the server up" in message and "\n" not in message


def test_a_server_that_stays_too_slow_is_one_error(server: Server, answers: Answer) -> None:
    server.replies = [replace(GOOD, after_seconds=1.0)]
    message = error_of(answers, questions_of("a"), timeout_seconds=0.1, retries=1)
    assert "no answer within evaluate.endpoint.timeout_seconds=0.1" in message and "in 2 attempts" in message


def test_a_server_that_keeps_failing_is_one_error_with_its_reply(server: Server, answers: Answer) -> None:
    server.replies = [Reply("out of\n memory", 500)]
    message = error_of(answers, questions_of("a"), retries=2)
    assert "did not come in 3 attempts (status 500: out of memory)" in message
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "api_key_env"), (403, "api_key_env"), (404, "evaluate.endpoint.model"), (400, "evaluate.endpoint.model")],
)
def test_a_refused_request_is_not_repeated_and_names_the_row(
    server: Server, answers: Answer, status: int, remedy: str
) -> None:
    server.replies = [Reply({"error": {"message": "no"}}, status)]
    message = error_of(answers, questions_of("a"))
    assert f"the answer to row a was refused with status {status}" in message and remedy in message
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        "<html>hello</html>",
        "",
        {"choices": []},
        {"object": "error"},
        [1],
        None,
        {"choices": [{"message": {"content": "5"}, "finish_reason": "stop"}]},
        {"choices": [{"message": None, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}},
        completion(content=["5"]),
        completion(tool_calls=[{}]),
    ],
    ids=["html", "empty", "no-choices", "other", "list", "null", "no-usage", "no-message", "no-text", "no-function"],
)
def test_an_unexpected_reply_is_one_error_that_quotes_it(server: Server, answers: Answer, body: Any) -> None:
    server.replies = [Reply(body)]
    message = error_of(answers, questions_of("a"))
    assert message.startswith(
        f"evaluate.endpoint.url={server.url}: the answer to row a is not what OpenAI's API promises"
    )
    assert "kept" in message and len(server.asked) == 1
    shown = body if isinstance(body, str) else json.dumps(body)
    assert (shown or "nothing") in message


def test_only_the_beginning_of_a_long_reply_is_shown(server: Server, answers: Answer) -> None:
    server.replies = [Reply("x" * 5000)]
    assert len(error_of(answers, questions_of("a"))) < 1000


def test_answers_before_a_failure_are_kept_and_not_asked_again(server: Server, answers: Answer, tmp_path: Path) -> None:
    server.replies = [GOOD, GOOD, Reply("<html>")]
    error_of(answers, questions_of(*"abcd"), concurrency=1)
    assert len((tmp_path / GENERATIONS.file).read_text().splitlines()) == 2
    server.replies, server.asked = [GOOD], []
    assert len(answers(questions_of(*"abcd"))) == 4
    assert sorted(body["messages"][0]["content"] for body in server.bodies()) == ["c", "d"]


def test_no_server_is_needed_if_everything_is_answered(server: Server, answers: Answer) -> None:
    before = answers(questions_of("a"))
    server.asked = []
    assert answers(questions_of("a")) == before
    assert server.asked == []


def test_a_failure_cancels_the_other_requests(server: Server, answers: Answer) -> None:
    server.replies = [Reply("no", 401), replace(GOOD, after_seconds=4.0)]
    started = time.monotonic()
    error_of(answers, questions_of(*"abcdefgh"), concurrency=4)
    assert time.monotonic() - started < 3


# --- the key ---------------------------------------------------------------------------------------------------------


def test_the_key_from_the_environment_is_sent_and_never_stored(
    server: Server, answers: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    answers(questions_of("a"), api_key_env="MY_KEY")
    assert server.asked[0][2]["Authorization"] == f"Bearer {KEY}"
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())


def test_without_a_variable_no_key_is_sent(server: Server, answers: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answers(questions_of("a"))
    assert "Authorization" not in server.asked[0][2]


def test_a_key_that_the_server_quotes_is_masked_in_the_message(
    server: Server, answers: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.replies = [Reply(f"Incorrect API key: {KEY}", 401)]
    message = error_of(answers, questions_of("a"), api_key_env="MY_KEY")
    assert "Incorrect API key: ***" in message and KEY not in message


def test_a_line_break_after_the_key_is_not_part_of_it(
    server: Server, answers: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    answers(questions_of("a"), api_key_env="MY_KEY")
    assert server.asked[0][2]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("value", ["sk-sécret", "sk-secret\nsecond"])
def test_an_invalid_key_is_refused_without_showing_it(
    server: Server, answers: Answer, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    message = error_of(answers, questions_of("a"), api_key_env="MY_KEY")
    assert "evaluate.endpoint.api_key_env=MY_KEY" in message and "sk-" not in message
    assert server.asked == []


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_an_error_before_anything_is_sent(
    server: Server, answers: Answer, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    assert "evaluate.endpoint.api_key_env=MY_KEY" in error_of(answers, questions_of("a"), api_key_env="MY_KEY")
    assert server.asked == []


# --- tokens in place of messages -------------------------------------------------------------------------------------

WHOLE = "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>5"
CALL = "<|channel|>commentary to=functions.add<|message|>{}"


def text_completion(text: Any = f"{WHOLE}<|return|>", finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": 9}}


@pytest.fixture
def completed(server: Server, tmp_path: Path) -> Answer:
    """A function that asks the server for completions, and returns the answers in the journal."""
    server.replies = [Reply(text_completion())]

    def of(wanted: list[Question], generation: GenerationConfig = SETTINGS, **settings: Any) -> list[Transcript]:
        configured = EndpointConfig(**{"url": server.url, "timeout_seconds": 5.0, **settings})
        journal: Journal[Transcript] = Journal(tmp_path, {})
        served = find(replace(configured, model="tiny"))
        pairs = [(question, [5, 6, 7]) for question in wanted]
        ask(served, pairs, journal, endpoint=configured, settings=generation)
        return [journal[question.key] for question in wanted]

    return of


def test_by_default_tokens_are_sent_and_special_tokens_requested(server: Server, completed: Answer) -> None:
    completed(questions_of("a"))
    ((path, body, _),) = server.asked
    assert path == "/v1/completions"
    assert {name: body[name] for name in ("model", "prompt", "max_tokens", "temperature", "top_p")} == {
        "model": "tiny",
        "prompt": [5, 6, 7],
        "max_tokens": 7,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    assert body["skip_special_tokens"] is False and body["include_stop_str_in_output"] is True
    assert body["stop"] == ["<|return|>", "<|call|>"] and "seed" not in body


def test_a_servers_completion_is_parsed_like_a_local_one(completed: Answer) -> None:
    (found,) = completed(questions_of("a"))
    assert found == questions_of("a")[0].transcript(f"{WHOLE}<|return|>", "length", 9, None)
    assert (found.reasoning, found.answer, found.finish) == ("so", "5", "return")


@pytest.mark.parametrize(
    ("text", "finish", "ended"),
    [
        (WHOLE, "stop", "return"),  # the server removed the stop token
        (CALL, "stop", "call"),
        (f"{CALL}<|call|>", "stop", "call"),
        (WHOLE, "length", "length"),
    ],
)
def test_finish_is_known_with_and_without_the_stop_token(
    server: Server, completed: Answer, text: str, finish: str, ended: str
) -> None:
    server.replies = [Reply(text_completion(text, finish))]
    (found,) = completed(questions_of("a"))
    assert found.finish == ended
    assert found.completion == (text if ended == "length" else f"{text.removesuffix('<|call|>')}<|{ended}|>")


def test_each_sampled_completion_has_its_own_seed(server: Server, completed: Answer) -> None:
    both = questions([questions_of("a")[0].prompt], 2)
    found = completed(both, replace(SETTINGS, temperature=0.7, samples=2))
    assert {each.seed for each in found} == {body["seed"] for body in server.bodies()}


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_server_that_removes_special_tokens_is_an_error_that_names_the_other_api(
    server: Server, completed: Answer, finish: str
) -> None:
    server.replies = [Reply(text_completion("analysissoassistantfinal5", finish))]
    message = error_of(completed, questions_of(*"abc"))
    assert "no answer has a special token" in message and "evaluate.endpoint.api=chat" in message


@pytest.mark.parametrize("body", [text_completion(None), text_completion(["5"]), completion(), {"choices": []}])
def test_a_reply_without_a_completion_is_one_error(server: Server, completed: Answer, body: Any) -> None:
    server.replies = [Reply(body)]
    assert "the answer to row a is not what OpenAI's API promises" in error_of(completed, questions_of("a"))


def test_a_server_that_takes_no_tokens_is_an_error_that_names_the_other_api(server: Server, completed: Answer) -> None:
    server.replies = [Reply({"error": {"message": "prompt must be a string"}}, 400)]
    message = error_of(completed, questions_of("a"))
    assert "prompt must be a string" in message and "evaluate.endpoint.api=chat" in message


def test_the_two_apis_are_different_subjects(server: Server) -> None:
    settings = EndpointConfig(url=server.url, model="m")
    assert find(settings).fingerprint != find(replace(settings, api=EndpointApi.chat)).fingerprint


def test_answers_to_instructions_of_another_role_are_not_taken_for_the_same(server: Server) -> None:
    developer = EndpointConfig(url=server.url, model="m", api=EndpointApi.chat)
    system = replace(developer, instructions_role=InstructionsRole.system)
    assert find(developer).fingerprint != find(system).fingerprint
    tokens = [replace(each, api=EndpointApi.completions) for each in (developer, system)]
    assert find(tokens[0]).fingerprint == find(tokens[1]).fingerprint  # tokens hold the instructions already
