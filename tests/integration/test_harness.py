"""Suites of lm-evaluation-harness: custom tasks over local data, on a tiny model and on a server."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import Reply, Server, completion

from pipeline.config import EndpointConfig, LmEvalConfig, TinyConfig
from pipeline.data.conversations import Conversation
from pipeline.data.harmony import Rendering, render_prompt
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.evaluate.generation.endpoint import Served
from pipeline.evaluate.scorers.harness import Suites
from pipeline.models.loading import load_plain
from pipeline.models.tiny_model import create_tiny

QUESTIONS = ["Is ice cold?", "Is fire cold?", "Is snow warm?", "Is steam hot?"]
CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
FREE = """\
task: own_free
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["<|return|>"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not load the thousands of tasks that come with lm-eval, because reading them takes five seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks over the same four questions."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "questions.jsonl"
    rows = [{"question": text, "label": i % 2, "answer": "5"} for i, text in enumerate(QUESTIONS)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("free", FREE)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("harness") / "tiny"
    create_tiny(directory, TinyConfig())
    return directory


def settings(folder: Path, *names: str, **more: Any) -> LmEvalConfig:
    return LmEvalConfig(tasks=list(names), include_path=str(folder), batch_size=2, **more)


def rendering(directory: Path) -> Rendering:
    return Rendering(load_tokenizer(directory), "low", "2025-08-05", every_turn=True)


@pytest.mark.usefixtures("only_own_tasks")
def test_the_data_of_tasks_are_checked_without_a_model(tasks: Path, tmp_path: Path) -> None:
    suites = Suites(settings(tasks, "own_choice", "own_free"))
    suites.check_data()
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"evaluate\.lm_eval\.tasks=.*lm-eval cannot run them"):
        suites.check_data()


def likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """Compute the log-probability of the answer's tokens, given the question."""
    prompt, whole = (tokenizer(text)["input_ids"] for text in (question, question + answer))
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))


@pytest.mark.usefixtures("only_own_tasks")
def test_own_tasks_count_by_their_contents_wherever_they_are(tasks: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(tasks, tmp_path / "moved"))
    (moved / "__pycache__").mkdir()
    (moved / "__pycache__" / "utils.pyc").touch()
    before = Suites(settings(tasks, "own_choice")).own_fingerprint()
    assert Suites(settings(moved, "own_choice")).own_fingerprint() == before is not None
    with (moved / "free.yaml").open("a") as file:
        file.write("\n")
    assert Suites(settings(moved, "own_choice")).own_fingerprint() != before


@pytest.mark.usefixtures("only_own_tasks")
def test_the_score_of_a_model_in_memory_matches_its_likelihoods(tasks: Path, tiny: Path) -> None:
    model = load_plain(tiny, torch.float32, experts_implementation="eager").eval()
    found = Suites(settings(tasks, "own_choice")).score_model(model, rendering(tiny))
    tokenizer = load_tokenizer(tiny)
    right = [
        (likelihood(model, tokenizer, text, " no") > likelihood(model, tokenizer, text, " yes")) == (i % 2)
        for i, text in enumerate(QUESTIONS)
    ]
    rate = sum(right) / len(right)
    assert found["lm_eval/own_choice/acc"] == rate
    assert found["lm_eval/own_choice/acc_stderr"] == pytest.approx((rate * (1 - rate) / 3) ** 0.5)


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.parametrize("form", ["harmony", "template"])
def test_chat_is_rendered_as_in_training(tasks: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    model, seen = load_plain(tiny, torch.float32, experts_implementation="eager").eval(), []
    generate = model.generate

    def watching(input_ids: torch.Tensor, **more: Any) -> Any:
        seen.append(rendering(tiny).tokenizer.decode(input_ids[0]))
        return generate(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "generate", watching)
    chat = settings(tasks, "own_free", limit=1, apply_chat_template=True)
    form_of = replace(rendering(tiny), form=form, reasoning_language="French")
    found = Suites(chat).score_model(model, form_of)
    assert "lm_eval/own_free/exact_match" in found
    assert seen[0] == render_prompt(Conversation([{"role": "user", "content": QUESTIONS[0]}]), form_of)
    assert "French" in seen[0]
    assert "Current date: 2025-08-05" in seen[0] and "Reasoning: low" in seen[0]
    assert seen[0].endswith("<|start|>user<|message|>Is ice cold?<|end|><|start|>assistant")


@pytest.mark.usefixtures("only_own_tasks")
def test_a_model_on_a_server_is_asked_by_the_harness(tasks: Path, tiny: Path, server: Server) -> None:
    reply = {**completion("5"), "choices": [{"index": 0, **completion("5")["choices"][0]}]}
    server.replies = [Reply(reply, headers={"Content-Type": "application/json"})]  # aiohttp requires it
    chat = settings(tasks, "own_free", apply_chat_template=True)
    endpoint = EndpointConfig(url=server.url, timeout_seconds=5.0)
    found = Suites(chat).score_served(Served("endpoint", server.url, "m", "chat"), endpoint, tiny)
    assert found["lm_eval/own_free/exact_match"] == 1.0
    assert {path for path, _, _ in server.asked} == {"/v1/chat/completions"}
    assert {body["messages"][-1]["content"] for body in server.bodies()} == set(QUESTIONS)


@pytest.mark.usefixtures("only_own_tasks")
def test_a_server_that_is_down_is_one_error(tasks: Path, tiny: Path) -> None:
    endpoint = EndpointConfig(url="http://127.0.0.1:9/v1", retries=0, timeout_seconds=1.0)
    served = Served("endpoint", "http://127.0.0.1:9/v1", "m", "completions")
    with pytest.raises(UserError, match=r"^evaluate\.endpoint\.url=http://127\.0\.0\.1:9/v1: did not answer lm-eval"):
        Suites(settings(tasks, "own_free")).score_served(served, endpoint, tiny)


def test_unknown_tasks_are_reported_together_with_suggestions(tasks: Path) -> None:
    with pytest.raises(UserError) as caught:
        Suites(settings(tasks, "own_choise", "own_fre"))
    assert "no such task: own_choise. Did you mean 'own_choice'" in str(caught.value)
    assert len(caught.value.problems) == 2


@pytest.mark.usefixtures("only_own_tasks")
def test_missing_data_are_one_error(tasks: Path, tiny: Path) -> None:
    (tasks.parent / "questions.jsonl").unlink()
    model = load_plain(tiny, torch.float32, experts_implementation="eager").eval()
    with pytest.raises(UserError, match=r"^evaluate\.lm_eval\.tasks=\['own_choice'\]: lm-eval cannot run them"):
        Suites(settings(tasks, "own_choice")).score_model(model, rendering(tiny))


def test_a_missing_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.lm_eval\.include_path=.*nowhere: no such folder\.$"):
        Suites(settings(tmp_path / "nowhere", "own_choice"))


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"pip install 'gpt-oss-qat\[lm-eval\]'"):
        Suites(LmEvalConfig(tasks=["x"]))
