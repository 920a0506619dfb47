"""A tiny model's greedy answers are the same with and without cache and padding. Samples follow the softmax."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import GenerationConfig, TinyConfig
from pipeline.data.conversations import Conversation
from pipeline.data.harmony import Rendering
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import UserError
from pipeline.evaluate.generation import local
from pipeline.evaluate.generation.journal import GENERATIONS, Journal
from pipeline.evaluate.generation.local import Local
from pipeline.evaluate.generation.prompts import Prompt, Question, questions
from pipeline.evaluate.transcripts import Transcript
from pipeline.models.loading import load_plain
from pipeline.models.tiny_model import create_tiny

GREEDY = GenerationConfig(max_new_tokens=8, batch_size=3)
DRAWN = replace(GREEDY, temperature=0.8, top_p=0.9, samples=2)
TEXTS = ("Hi", "What is 3 + 4?", "And 17 more? " * 9, "Why?", "Add 5, " * 4)


def prompt(text: str) -> Prompt:
    return Prompt(text, Conversation([{"role": "user", "content": text}], where=text), {"category": "sum"})


PROMPTS = [prompt(text) for text in TEXTS]


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Local:
    directory: Path = tmp_path_factory.mktemp("local") / "tiny"
    create_tiny(directory, TinyConfig(sliding_window=16))
    rendering = Rendering(load_tokenizer(directory), "low", "2025-08-05", every_turn=True)
    return Local(load_plain(directory, torch.float32, experts_implementation="eager").eval(), rendering, GREEDY)


@pytest.fixture(scope="module")
def drawn(greedy: Local) -> Local:
    return replace(greedy, settings=DRAWN)


def ask(model: Local, directory: Path, prompts: list[Prompt] = PROMPTS) -> list[Transcript]:
    journal = Journal(directory, {})
    model.ask(questions(prompts, model.settings.samples), journal, "tiny")
    return [journal[question.key] for question in questions(prompts, model.settings.samples)]


def without_cache(model: Local, question: Question, length: int) -> str:
    """Decode greedily: one forward pass over the whole sequence for each token."""
    (ids,) = model.token_ids([question])
    made: list[int] = []
    with torch.no_grad():
        for _ in range(length):
            logits = model.model(input_ids=torch.tensor([ids + made]), use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
    return model.rendering.tokenizer.decode(made)


def test_answers_of_a_batch_equal_those_of_a_loop_without_cache_and_padding(greedy: Local, tmp_path: Path) -> None:
    lengths = {len(ids) for ids in greedy.token_ids(questions(PROMPTS, 1))}
    assert len(lengths) > 3 and max(lengths) > 2 * 16  # some prompts are padded, some exceed the window
    for answer, question in zip(ask(greedy, tmp_path), questions(PROMPTS, 1), strict=True):
        assert answer.completion == without_cache(greedy, question, GREEDY.max_new_tokens)
        assert (answer.finish, answer.tokens, answer.seed) == ("length", GREEDY.max_new_tokens, None)


@pytest.mark.parametrize("fixture", ["greedy", "drawn"])
def test_the_batch_size_does_not_change_answers(fixture: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(fixture)
    single = replace(model, settings=replace(model.settings, batch_size=1))
    assert ask(single, tmp_path / "single") == ask(model, tmp_path / "many")


def test_an_answer_ends_with_its_stop_token_while_others_continue(
    greedy: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = greedy.rendering.tokenizer
    (batch,) = greedy._batches(questions(PROMPTS[:2], 1))
    free = greedy._complete(tuple(ids for _, ids in batch), None)
    stop = next(token for token in free[0] if token not in free[1])
    monkeypatch.setattr(local, "STOP_TOKENS", (tokenizer.convert_ids_to_tokens(stop),))
    ended = greedy._complete(tuple(ids for _, ids in batch), None)
    assert ended == [free[0][: free[0].index(stop) + 1], free[1]]


def test_finish_is_the_name_of_the_stop_token() -> None:
    for text, finish in (("<|return|>", "return"), ("<|call|>", "call"), ("<|end|>", "length"), ("", "length")):
        completion = f"<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>5{text}"
        answer = Question(PROMPTS[0], 0).transcript(completion, "length", 7, None)
        assert (answer.finish, answer.tokens, answer.completion) == (finish, 7, completion)
        assert (answer.reasoning, answer.answer, answer.expected) == ("so", "5", {"category": "sum"})


def test_samples_differ_and_a_seed_repeats_them(drawn: Local, tmp_path: Path) -> None:
    first = ask(drawn, tmp_path / "first")
    assert len({answer.completion for answer in first}) == len(first) == 2 * len(PROMPTS)
    assert ask(drawn, tmp_path / "again") == first
    other = replace(drawn, settings=replace(DRAWN, seed=1))
    assert not {answer.completion for answer in ask(other, tmp_path / "other")} & {a.completion for a in first}


def test_each_answer_stores_its_seed(drawn: Local, tmp_path: Path) -> None:
    seeds = [answer.seed for answer in ask(drawn, tmp_path)]
    assert seeds == [question.seed(DRAWN.seed) for question in questions(PROMPTS, 2)]


def test_an_interrupted_evaluation_ends_with_the_same_answers(drawn: Local, tmp_path: Path) -> None:
    whole = ask(drawn, tmp_path / "whole")
    kept = (tmp_path / "whole" / GENERATIONS.file).read_bytes().splitlines(keepends=True)
    for lines in (3, 4):  # interrupted after the first batch, and within the second
        directory = tmp_path / str(lines)
        Journal(directory, {})
        (directory / GENERATIONS.file).write_bytes(b"".join(kept[:lines]))
        assert ask(drawn, directory) == whole
        assert (directory / GENERATIONS.file).read_bytes() == b"".join(kept)


def test_only_batches_with_a_missing_answer_are_run(greedy: Local, tmp_path: Path, monkeypatch: Any) -> None:
    ask(greedy, tmp_path)
    lines = (tmp_path / GENERATIONS.file).read_bytes().splitlines(keepends=True)
    (tmp_path / GENERATIONS.file).write_bytes(b"".join(lines[:-1]))
    ran: list[int] = []
    monkeypatch.setattr(
        Local, "_complete", lambda self, prompts, seeds: ran.append(len(prompts)) or [[1]] * len(prompts)
    )
    ask(greedy, tmp_path)
    assert ran == [2]
    ask(greedy, tmp_path)
    assert ran == [2]


def test_noise_samples_from_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, float("-inf")])
    rows = 4000
    noise = local._Noise(list(range(rows)), torch.device("cpu"))
    drawn = noise(torch.empty(0), logits.expand(rows, -1)).argmax(1)
    share = torch.bincount(drawn, minlength=5) / rows
    expected = logits.softmax(0)
    assert share[4] == 0
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / rows).sqrt()).all()


def test_a_prompt_that_the_template_refuses_is_an_error_with_its_row(greedy: Local) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    bad = [
        {"role": "assistant", "content": "a", "thinking": "b", "tool_calls": [call]},
        {"role": "user", "content": ""},
    ]
    asked_for = [Question(Prompt(str(i), Conversation(bad, where=f"rows.jsonl: row {i}"), {}), 0) for i in range(10)]
    by_template = replace(greedy, rendering=replace(greedy.rendering, form="template"))
    with pytest.raises(UserError) as caught:
        by_template.token_ids([Question(PROMPTS[0], 0), *asked_for])
    assert str(caught.value).startswith("rows.jsonl: 10 rows (0, 1, 2 and 7 more): the chat template refuses it")


def test_too_little_memory_is_an_error_with_the_setting_to_lower(greedy: Local, monkeypatch: Any) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Local, "_complete", out_of_memory)
    with pytest.raises(UserError, match=r"^evaluate\.generation\.batch_size=3: .* Lower it\.$"):
        greedy.answer((Question(PROMPTS[0], 0),), ([1, 2],))
