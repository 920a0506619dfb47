"""Renders conversations in the Harmony format, and tokenizes them as training examples and as prompts.

An assistant turn has exactly the same form in training as at inference. The prompt has all earlier messages, and ends
with `<|start|>assistant`. The completion has the reasoning, the answer and the stop token. Only it is supervised. A
prompt does not have the reasoning of earlier turns. So each assistant turn becomes an example of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from pipeline.config import RenderingForm
from pipeline.data import harmony_text
from pipeline.data.conversations import Conversation, add_language
from pipeline.data.scripts import Script, Turn
from pipeline.data.template_text import Template
from pipeline.data.tokenizers import Tokenizer

IGNORED = -100
"""Label of a token that is not supervised. It is the default `ignore_index` of torch's cross entropy."""


@dataclass(frozen=True)
class Rendering:
    """Settings for rendering conversations.

    Attributes:
        tokenizer: a tokenizer of gpt-oss, with its chat template.
        reasoning_effort: low, medium or high. It applies to conversations that name no effort.
        conversation_date: the date after `Current date:` in the system message.
        every_turn: whether every assistant turn becomes an example. Otherwise only the last turn does. Turns whose
            weight is 0 never do.
        reasoning_language: the language for conversations that name no language, or None.
        model_identity: first line of the system message, or None to keep its usual first line.
        form: name of a `RenderingForm`.
    """

    tokenizer: Tokenizer
    reasoning_effort: str
    conversation_date: str
    every_turn: bool
    reasoning_language: str | None = None
    model_identity: str | None = None
    form: str = RenderingForm.harmony.name


@dataclass(frozen=True)
class Example:
    """A tokenized assistant turn.

    Attributes:
        input_ids: the tokens after truncation, or no tokens if truncation removes every supervised token.
        labels: as many labels. Only the completion is supervised.
        length: number of tokens before truncation.
        supervised: number of supervised tokens before truncation.
    """

    input_ids: list[int]
    labels: list[int]
    length: int
    supervised: int

    @property
    def kept_supervised(self) -> int:
        """Number of supervised tokens after truncation."""
        return max(0, len(self.input_ids) - (self.length - self.supervised))


def examples(conversation: Conversation, rendering: Rendering) -> list[dict[str, list[int]]]:
    """Make one training example per supervised assistant turn. `input_ids` and `labels` have the same length.

    Raises:
        ConversationError: see `render`.
    """
    (made,) = tokenize([render(conversation, rendering)], rendering.tokenizer)
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in made]


def render(conversation: Conversation, rendering: Rendering) -> Script:
    """Render the supervised assistant turns as text.

    Raises:
        ConversationError: the chat template refuses the conversation or is not a Harmony template.
    """
    written = _with_language(conversation, rendering)
    if rendering.form == RenderingForm.template.name:
        return _template(rendering).write_script(written, rendering.every_turn)
    return harmony_text.write_script(written, *_system_values(written, rendering), rendering.every_turn)


def render_prompt(conversation: Conversation, rendering: Rendering) -> str:
    """Render a conversation as text. The text ends where the next assistant turn begins.

    Raises:
        ConversationError: the chat template refuses the conversation.
    """
    written = _with_language(conversation, rendering)
    if rendering.form == RenderingForm.template.name:
        return _template(rendering).write_prompt(written, written.messages)
    return harmony_text.write_prompt(written, *_system_values(written, rendering))


def tokenize(scripts: Sequence[Script], tokenizer: Tokenizer, max_length: int | None = None) -> list[list[Example]]:
    """Return the examples of each script, truncated to `max_length` tokens.

    Pass many scripts at once: the tokenizer processes texts in parallel, and each text only once. The time is in
    proportion to the length of the scripts and of the truncated examples.
    """
    texts = list(dict.fromkeys(text for script in scripts for text in script.texts()))
    found = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    ids = dict(zip(texts, found, strict=True))
    return [_examples(script, ids, max_length) for script in scripts]


def _examples(script: Script, ids: dict[str, list[int]], max_length: int | None) -> list[Example]:
    settled = _Joined([ids[text] for text in script.settled if text in ids])
    recent = _Joined([ids[text] for text in script.recent])
    return [_example(turn, settled, recent, ids, max_length) for turn in script.turns]


def _example(
    turn: Turn, settled: "_Joined", recent: "_Joined", ids: dict[str, list[int]], max_length: int | None
) -> Example:
    before, since = (0, settled.ends[turn.settled]), (recent.ends[turn.start], recent.ends[turn.stop])
    opening, completion = ids[turn.opening], ids[turn.completion]
    prompt_length = before[1] + since[1] - since[0] + len(opening)
    length, supervised = prompt_length + len(completion), len(completion)
    if max_length is not None and prompt_length >= max_length:
        return Example([], [], length, supervised)
    prompt = settled.ids[slice(*before)] + recent.ids[slice(*since)] + opening
    labels = [IGNORED] * prompt_length + completion
    return Example((prompt + completion)[:max_length], labels[:max_length], length, supervised)


class _Joined:
    """Token ids of several texts in one list. `ends[n]` is the number of tokens in the first n texts."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.ids = [token for text in texts for token in text]
        self.ends = [0, *accumulate(map(len, texts))]


def _with_language(conversation: Conversation, rendering: Rendering) -> Conversation:
    language = conversation.reasoning_language or rendering.reasoning_language
    return replace(conversation, messages=add_language(conversation.messages, language))


def _system_values(conversation: Conversation, rendering: Rendering) -> tuple[str, str, str | None]:
    effort = conversation.reasoning_effort or rendering.reasoning_effort
    return effort, rendering.conversation_date, rendering.model_identity


def _template(rendering: Rendering) -> Template:
    date, identity = rendering.conversation_date, rendering.model_identity
    return Template(rendering.tokenizer, rendering.reasoning_effort, date, identity)
