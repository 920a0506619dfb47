"""Bounds and rules of `evaluate`, with their messages: prompts, answers, servers, judge and task suites."""

from functools import reduce
from typing import Any

import pytest
from conftest import run_program

from pipeline import config
from pipeline.config import ColumnsConfig, DataConfig, EndpointApi, ModelConfig, PipelineConfig, Stage, rules

URL = "http://localhost:8000/v1"


def broken(**settings: Any) -> list[str]:
    """List the rules that `evaluate` breaks with these settings. Two underscores in a name stand for a dot."""
    changed = PipelineConfig(stage=Stage.evaluate, model=ModelConfig(path="model"), data=DataConfig(path="data"))
    for key, value in settings.items():
        *sections, name = key.split("__")
        setattr(reduce(getattr, sections, changed.evaluate), name, value)
    return rules.problems(changed)


@pytest.mark.parametrize(
    ("key", "value", "meaning"),
    [
        ("prompts.max_samples", 0, "greater than 0"),
        ("generation.max_new_tokens", 0, "greater than 0"),
        ("generation.temperature", -0.5, "0 or more"),
        ("generation.top_p", 0.0, "above 0 and up to 1"),
        ("generation.top_p", 1.5, "above 0 and up to 1"),
        ("generation.samples", 0, "greater than 0"),
        ("generation.seed", -1, "from 0 to 4294967295"),
        ("generation.batch_size", 0, "greater than 0"),
        ("endpoint.concurrency", 0, "greater than 0"),
        ("endpoint.retries", -1, "0 or more"),
        ("endpoint.timeout_seconds", 0.0, "greater than 0"),
        ("judge.attempts", 0, "greater than 0"),
        ("judge.max_new_tokens", 0, "greater than 0"),
        ("judge.max_without_verdict", 1.5, "from 0 to 1"),
        ("judge.concurrency", 0, "greater than 0"),
        ("lm_eval.limit", 0, "greater than 0"),
        ("lm_eval.num_fewshot", -1, "0 or more"),
        ("lm_eval.batch_size", 0, "greater than 0"),
        ("during_training.prompts", -1, "0 or more"),
        ("during_training.max_new_tokens", 0, "greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(key: str, value: Any, meaning: str) -> None:
    assert broken(**{key.replace(".", "__"): value}) == [f"evaluate.{key}={value!r}: must be {meaning}."]


def test_several_samples_with_greedy_decoding_are_refused() -> None:
    (problem,) = broken(generation__samples=3)
    assert problem.startswith("evaluate.generation.samples=3: all answers to a prompt are the same")
    assert broken(generation__samples=3, generation__temperature=0.6) == []


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1", f"{URL}?a=b"]
)
def test_a_text_that_is_no_address_is_refused(url: str) -> None:
    assert broken(generate=True, endpoint__url=url) == [
        f"evaluate.endpoint.url={url!r}: must be like http://localhost:8000/v1."
    ]


def test_an_empty_text_is_one_problem() -> None:
    for name in ("url", "name"):
        (problem,) = broken(generate=True, **{f"endpoint__{name}": ""})
        assert problem.startswith(f"evaluate.endpoint.{name}: is empty")


@pytest.mark.parametrize("url", [URL, "https://host", "http://[::1]:8000/v1", "http://10.0.0.1:1/a/b"])
def test_an_address_is_accepted(url: str) -> None:
    assert broken(generate=True, endpoint__url=url) == []


def test_a_password_in_an_address_is_refused_without_showing_it() -> None:
    (problem,) = broken(generate=True, endpoint__url="http://me:secret@host/v1")
    assert "secret" not in problem and "evaluate.endpoint.api_key_env" in problem


def test_a_server_without_prompts_or_tasks_is_refused() -> None:
    (problem,) = broken(endpoint__url=URL)
    assert (
        problem.startswith(f"evaluate.endpoint.url={URL}: unused with evaluate.generate=false")
        and "eval=quick" in problem
    )


@pytest.mark.parametrize("name", ["sft", "all", "a/b", "..", "a b"])
def test_a_name_of_a_stage_or_with_other_characters_is_refused(name: str) -> None:
    (problem,) = broken(endpoint__name=name)
    assert problem.startswith(f"evaluate.endpoint.name={name!r}: must be letters")


@pytest.mark.parametrize(
    ("name", "value"),
    [("split", "test"), ("filter", {"a": ["b"]}), ("roles", {"a": "user"}), ("columns", ColumnsConfig(role="from"))],
)
def test_settings_of_another_data_set_without_its_path_are_refused(name: str, value: Any) -> None:
    (problem,) = broken(**{f"prompts__{name}": value})
    assert problem.startswith(f"evaluate.prompts.{name}=") and "only to evaluate.prompts.path" in problem
    assert broken(**{f"prompts__{name}": value}, prompts__path="rows.jsonl") == []


def test_prompts_come_from_exactly_one_column() -> None:
    assert broken(prompts__path="a", prompts__columns=ColumnsConfig(messages=None, prompt="question")) == []
    for columns in (ColumnsConfig(messages=None), ColumnsConfig(prompt="question")):
        (problem,) = broken(prompts__path="a", prompts__columns=columns)
        assert problem.startswith("evaluate.prompts.columns: messages=")


def test_mappings_of_the_prompts_accept_any_names() -> None:
    assert config.is_known("evaluate.prompts.expected.category") and config.is_known("evaluate.prompts.filter.kind")


def test_the_group_eval_sets_generation_and_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for choice in ("none", "quick", "full"):
        arguments = ("--cfg", "job", "stage=evaluate", "recipe=smoke", f"eval={choice}", "--package", "evaluate")
        assert run_program(*arguments) == 0
        shown[choice] = capsys.readouterr().out
    assert "generate: false" in shown["none"] and "generate: true" in shown["quick"]
    assert "max_samples: 16" in shown["quick"] and "max_samples: 16" not in shown["full"]
    assert run_program("--cfg", "job", "stage=evaluate", "recipe=smoke", "--package", "evaluate") == 0
    assert capsys.readouterr().out == shown["none"]


def test_a_judge_needs_answers_and_an_address() -> None:
    (problem,) = broken(judge__url=URL)
    assert problem.startswith(f"evaluate.judge.url={URL}: there are no answers to judge, because evaluate.generate")
    assert broken(judge__url=URL, generate=True) == []
    assert broken(judge__url="localhost", generate=True) == [
        "evaluate.judge.url='localhost': must be like http://localhost:8000/v1."
    ]


def test_a_server_with_task_suites_needs_no_prompts() -> None:
    assert broken(endpoint__url=URL, lm_eval__tasks=["x"]) == []


@pytest.mark.parametrize(("api", "chat"), [("completions", True), ("chat", False)])
def test_the_template_of_task_suites_must_fit_the_api(api: str, chat: bool) -> None:
    settings = {"endpoint__url": URL, "endpoint__api": EndpointApi[api], "lm_eval__tasks": ["x"]}
    (problem,) = broken(**settings, lm_eval__apply_chat_template=chat)
    assert f"apply_chat_template={str(chat).lower()}: not with evaluate.endpoint.api={api}" in problem
    assert broken(**settings, lm_eval__apply_chat_template=not chat) == []
