"""Find problems in the figures, and advise how to solve them. The most serious problems come first."""

import math
from collections.abc import Callable

from pipeline.config import RenderingForm
from pipeline.config.engines import engines_that_render, ways_to_set_first_line
from pipeline.data import control_text
from pipeline.doctor import fit
from pipeline.doctor.facts import Facts

_FEW_ROWS = 20
_MOST_HELD_OUT = 0.5
_ROUND = 64


def findings(facts: Facts) -> list[str]:
    """Return one message for each problem, the most serious first."""
    return [message for check in _CHECKS for message in check(facts)]


def _other_tokens(facts: Facts) -> list[str]:
    parity = facts.data["parity"]
    first = parity.get("first")
    if first is None:
        return []
    return [
        f"examples whose tokens differ from openai-harmony's: {parity['differ']} of {parity['examples']}. The first is"
        f" {first['where']}. Around token {first['position']}, it has {first['ours']!r} instead of {first['theirs']!r}."
        f" Inference engines ({', '.join(engines_that_render(facts.plan.data.rendering.name))}) would send prompts that"
        " the model was not trained on. Use the released tokenizer and chat template in model.path."
    ]


def _leaks(facts: Facts) -> list[str]:
    leaks = facts.data["leaks"]
    if not leaks["normalized"]:
        return []
    remedy = "Remove them from data.validation, or from the training rows" if facts.plan.data.validation.is_set else ""
    return [
        f"validation rows whose prompt is also in the training rows: {leaks['normalized']} of"
        f" {facts.data['rows']['validation']} ({_and_more(leaks['first'], leaks['normalized'])}). Prompts that are"
        f" equal word for word: {leaks['exact']}. The validation loss of these rows measures memorization."
        f" {remedy or 'Keep one row of each prompt in data.path'}."
    ]


def _control_text(facts: Facts) -> list[str]:
    found = facts.data["control_text"]
    if not found["rows"]:
        return []
    return [control_text.describe(found["rows"], found["rows_by_token"], found["first"])]


def _empty_answers(facts: Facts) -> list[str]:
    found = facts.data["empty_answers"]
    if not found["turns"]:
        return []
    return [
        f"trained answers without text: {found['turns']} in {found['rows']} rows"
        f" ({_and_more(found['first'], found['rows'])}). They teach the model to end its turn without an answer. Remove"
        " these turns from data.path, or give them the weight 0."
    ]


def _unoffered(facts: Facts) -> list[str]:
    found = facts.data["unoffered"]
    if not found["calls"]:
        return []
    names = ", ".join(f"{name} ({count})" for name, count in list(found["by_name"].items())[:5])
    return [
        f"calls of functions that their row does not offer: {found['calls']} in {found['rows']} rows"
        f" ({_and_more(found['first'], found['rows'])}). Calls by function: {names}. They teach the model to call"
        " functions that it was not offered. Add the functions to the row's tools."
    ]


def _unanswered(facts: Facts) -> list[str]:
    found = facts.data["unanswered"]
    if not found["rows"]:
        return []
    return [
        f"rows whose last message has no answer: {found['rows']} ({_and_more(found['first'], found['rows'])}). This"
        " message is not used. Add its answer, or remove the message."
    ]


def _nothing_to_learn(facts: Facts) -> list[str]:
    found = facts.data["nothing_to_learn"]
    if not found["examples"]:
        return []
    return [
        f"examples dropped because data.max_length={facts.plan.data.max_length} truncates all their supervised tokens:"
        f" {found['examples']} ({_and_more(found['first'], found['examples'])}). {_longer(facts)}"
    ]


def _truncation(facts: Facts) -> list[str]:
    cut = facts.data["cut"]
    if not cut["supervised_tokens_lost"]:
        return []
    return [
        f"examples truncated at data.max_length={cut['max_length']}: {cut['examples']}"
        f" ({_and_more(cut['first'], cut['rows'])}). They lose {cut['supervised_share_lost']:.1%} of all supervised"
        f" tokens, and the token that ends the answer. {_longer(facts)}"
    ]


def _unused(facts: Facts) -> list[str]:
    return facts.data["unused"]["warnings"]


def _other_rendering(facts: Facts) -> list[str]:
    found = facts.data["rendering"]
    if not found["differ"]:
        return []
    (other,) = (form.name for form in RenderingForm if form.name != found["form"])
    parts = ", ".join(f"{part} in {rows}" for part, rows in found["parts"].items())
    kinds = f" Parts that may differ, with their rows: {parts}." if parts else ""
    return [
        f"rows that have other tokens with data.rendering={other}: {found['differ']} of {found['compared']}"
        f" ({_and_more(found['first'], found['differ'])}).{kinds} data.rendering={found['form']} gives the tokens of"
        f" {', '.join(engines_that_render(found['form']))}. data.rendering={other} gives the tokens of"
        f" {', '.join(engines_that_render(other))}. Choose the one of your engine."
    ]


def _first_line(facts: Facts) -> list[str]:
    data = facts.plan.data
    if data.model_identity is None:
        return []
    ways = ways_to_set_first_line(data.rendering.name)
    return [
        f"data.model_identity={data.model_identity!r} is the first line of every trained prompt, but chat APIs write"
        f" their own, unless the request sets it: {', '.join(ways)}. For any other engine, send tokens to its"
        " completions API. Or put the text into the data's instructions, and set data.model_identity=null."
    ]


def _no_reasoning(facts: Facts) -> list[str]:
    found = facts.data["reasoning"]
    if not found["turns_without"]:
        return []
    return [
        f"assistant turns without reasoning: {found['turns_without']} of {found['turns']}"
        f" ({_and_more(found['first'], found['turns_without'])}). They teach the model to answer without reasoning."
        " Give the reasoning as 'thinking'. If there is none, set the row's reasoning_effort or"
        " data.reasoning_effort to low."
    ]


def _copies(facts: Facts) -> list[str]:
    found = facts.data["copies"]
    if not found["rows"]:
        return []
    return [
        f"rows that copy another row: {found['rows']} ({_and_more(found['first'], found['rows'])}). Each copy gives"
        " its row more weight. If you do not want this, remove the copies from data.path."
    ]


def _few_to_validate(facts: Facts) -> list[str]:
    rows, data = facts.data["rows"], facts.plan.data
    if rows["validation"] >= _FEW_ROWS:
        return []
    if data.validation.is_set:
        return [
            f"rows of data.validation: {rows['validation']}. With so few, the validation loss is mostly noise. Use more"
            " rows."
        ]
    chosen = rows["train"] + rows["validation"]
    fraction = math.ceil(100 * _FEW_ROWS / chosen) / 100
    remedy = f"Set data.validation_fraction={fraction}" if fraction <= _MOST_HELD_OUT else "Use more rows"
    return [
        f"rows held out by data.validation_fraction={data.validation_fraction}: {rows['validation']}. With so few, the"
        f" validation loss is mostly noise. {remedy}."
    ]


def _longer(facts: Facts) -> str:
    longest = facts.data["lengths"]["longest"]
    return f"data.max_length={-(-longest // _ROUND) * _ROUND} keeps everything, but takes more memory."


def _and_more(first: list[str], total: int) -> str:
    return "; ".join(first) + (", …" if total > len(first) else "")


_CHECKS: tuple[Callable[[Facts], list[str]], ...] = (
    fit.findings,
    _unused,
    _other_tokens,
    _leaks,
    _control_text,
    _empty_answers,
    _unoffered,
    _nothing_to_learn,
    _truncation,
    _no_reasoning,
    _unanswered,
    _copies,
    _few_to_validate,
    _other_rendering,
    _first_line,
)
"""The checks, in the order of their findings.

Problems that stop the run come first. Then come problems that make figures wrong, teach wrong behaviour, or waste data.
"""
