"""With data.rendering=harmony, conversations are written as in the engines, and each text is tokenized once."""

from collections import Counter
from typing import Any

import pytest

from pipeline.data import harmony
from pipeline.data.harmony import IGNORED, Rendering
from pipeline.data.parsing import parse_conversation

USER = {"role": "user", "content": "How many?"}
ANSWER = {"role": "assistant", "thinking": "2 times 4", "content": "Eight."}
CALL = {
    "role": "assistant",
    "thinking": "I add.",
    "content": "I look.",
    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": {"a": 2}}}],
}
TOOL = {"role": "tool", "tool_call_id": "1", "content": '{"legs": 8}'}
HEAD = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-05\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be"
    " included for every message.<|end|>"
)
OPENING = "<|start|>assistant"
CALLED = (
    f"{OPENING}<|channel|>commentary<|message|>I look.<|end|>"
    f'{OPENING} to=functions.add<|channel|>commentary <|constrain|>json<|message|>{{"a": 2}}<|call|>'
    '<|start|>functions.add to=assistant<|channel|>commentary<|message|>{"legs": 8}<|end|>'
)


def rendering(tokenizer: Any = None, **more: Any) -> Rendering:
    return Rendering(tokenizer, "medium", "2025-08-05", **{"every_turn": True, **more})


def turns(messages: list[Any], **more: Any) -> list[tuple[str, str]]:
    """Return the prompt and the completion of each trained turn."""
    script = harmony.render(parse_conversation({"messages": messages}), rendering(**more))
    return [(script.prompt(turn), turn.completion) for turn in script.turns]


def test_results_are_bare_and_calls_are_constrained_to_json() -> None:
    call, answer = turns([USER, CALL, TOOL, ANSWER])
    asked = f"{HEAD}<|start|>user<|message|>How many?<|end|>"
    assert call == (
        f"{asked}{OPENING}",
        f"<|channel|>analysis<|message|>I add.<|end|>{CALLED.partition('<|start|>functions')[0]}",
    )
    assert answer[0] == f"{asked}{OPENING}<|channel|>analysis<|message|>I add.<|end|>{CALLED}{OPENING}"
    assert answer[1] == (
        f"<|channel|>analysis<|message|>2 times 4<|end|>{OPENING}<|channel|>final<|message|>Eight.<|return|>"
    )


def test_after_the_answer_the_reasoning_of_its_calls_is_dropped_and_the_text_for_the_user_is_kept() -> None:
    *_, (prompt, _) = turns([USER, CALL, TOOL, ANSWER, USER, ANSWER])
    asked = "<|start|>user<|message|>How many?<|end|>"
    assert prompt == f"{HEAD}{asked}{CALLED}{OPENING}<|channel|>final<|message|>Eight.<|end|>{asked}{OPENING}"


def test_instructions_end_without_a_blank_line() -> None:
    ((prompt, _),) = turns([{"role": "system", "content": "Be brief."}, USER, ANSWER])
    assert prompt.startswith(f"{HEAD}<|start|>developer<|message|># Instructions\n\nBe brief.<|end|><|start|>user")


def test_a_result_of_an_earlier_call_has_the_name_of_its_function() -> None:
    other = {**CALL, "tool_calls": [{"id": "2", "function": {"name": "other"}}]}
    *_, (prompt, _) = turns([USER, CALL, other, TOOL, {**TOOL, "tool_call_id": "2"}, ANSWER])
    assert "<|start|>functions.add to=assistant" in prompt and "<|start|>functions.other to=assistant" in prompt


def test_an_evaluation_prompt_is_the_prompt_of_the_same_training_turn() -> None:
    messages = [USER, CALL, TOOL, ANSWER, USER, CALL, TOOL, ANSWER]
    prompts = [prompt for prompt, _ in turns(messages)]
    for end, prompt in zip((1, 3, 5, 7), prompts, strict=True):
        asked = parse_conversation({"messages": messages[:end]}, needs_answer=False)
        assert harmony.render_prompt(asked, rendering()) == prompt


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["harmony", "template"])
def test_a_turn_of_weight_zero_is_context_and_exactly_its_tokens_are_not_trained(tokenizer: Any, form: str) -> None:
    wrong = {"role": "assistant", "content": "Nine."}
    how = rendering(tokenizer, form=form)
    both, one = (
        harmony.examples(parse_conversation({"messages": [USER, {**wrong, "weight": weight}, USER, ANSWER]}), how)
        for weight in (1, 0)
    )
    assert one == both[1:]  # the answer of weight 0 is still in the prompt
    (alone,) = harmony.examples(parse_conversation({"messages": [USER, wrong]}), how)
    trained = [sum(label != IGNORED for example in found for label in example["labels"]) for found in (both, one)]
    assert trained[0] - trained[1] == sum(label != IGNORED for label in alone["labels"])


def test_the_last_turn_is_the_last_one_with_a_weight() -> None:
    ((_, completion),) = turns([USER, ANSWER, USER, {**ANSWER, "content": "Nine.", "weight": 0}], every_turn=False)
    assert completion.endswith("Eight.<|return|>")


# --- cost ------------------------------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that makes a token of each character, and counts the texts and characters that it gets."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        self.counts.update(texts=len(texts), characters=sum(map(len, texts)))
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def long_chat(turns: int) -> Any:
    messages = [m for i in range(turns) for m in ({**USER, "content": f"{i}?"}, {**ANSWER, "content": f"{i}."})]
    return parse_conversation({"messages": messages})


def test_the_work_for_a_conversation_grows_in_proportion_to_its_length() -> None:
    counted = []
    for count in (100, 200, 400):
        tokenizer = Counting()
        (made,) = harmony.tokenize([harmony.render(long_chat(count), rendering())], tokenizer, 2000)
        tokens = sum(len(example.input_ids) for example in made)
        counted.append((tokenizer.counts["texts"] / count, tokenizer.counts["characters"] / count, tokens))
    assert counted[2][0] < 1.01 * counted[1][0] < 1.02 * counted[0][0]
    assert counted[2][1] < 1.1 * counted[0][1]
    assert counted[0][2] == counted[1][2] == counted[2][2]  # turns that begin after max_length have no tokens


def test_truncated_examples_are_the_beginnings_of_the_whole_ones() -> None:
    script = harmony.render(long_chat(10), rendering())
    (whole,), (cut,) = (harmony.tokenize([script], Counting(), limit) for limit in (None, 700))
    assert [example.length for example in cut] == [len(example.input_ids) for example in whole]
    assert {len(example.input_ids) for example in cut} >= {0, 700}
    for mine, full in zip(cut, whole, strict=True):
        kept = 700 if mine.input_ids else 0
        assert (mine.input_ids, mine.labels) == (full.input_ids[:kept], full.labels[:kept])
        assert mine.kept_supervised == sum(label != IGNORED for label in full.labels[:700])
