"""Renders conversations with the tokenizer's chat template, as llama.cpp, MLX and transformers do.

The template writes each prompt anew, so a conversation of n turns takes time in proportion to n². A template is a
program that others wrote, so it is compiled and rendered in a process of its own, with limits of time and memory.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateSyntaxError

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.data.conversations import Conversation, ConversationError, Message, is_trained
from pipeline.data.scripts import Script, Turn
from pipeline.errors import UserError
from pipeline.runs.limits import CodeError, LimitedFunction, TimeLimitError

if TYPE_CHECKING:
    from pipeline.data.tokenizers import Tokenizer

MOST_SECONDS = 10.0
"""Limit of the CPU time for the prompts and completions of one conversation."""
MOST_MEMORY = 1 << 31
"""Limit of the memory that the template may allocate for the texts of one conversation, in bytes."""
_ADVICE = "The template is chat_template.jinja in model.path. Correct it or the row, or use data.rendering=harmony"
_PLACEHOLDER: list[Message] = [{"role": "user", "content": ""}]


class _Part(NamedTuple):
    """Messages to render as one text. `for_generation` adds the beginning of the next assistant turn."""

    messages: list[Message]
    for_generation: bool


class _Request(NamedTuple):
    """Texts to render, the template's further arguments, and today's date for the template."""

    parts: Sequence[_Part]
    options: Mapping[str, object]
    date: str


class TemplateError(UserError):
    """The template has a syntax error, or takes too long or too much memory. So it can write no row.

    `reason` is the message without its advice.
    """

    def __init__(self, reason: str, advice: str) -> None:
        """Create the error from its two sentences."""
        super().__init__(f"{reason} {advice}")
        self.reason = reason


class Template:
    """The chat template of a tokenizer, with the values for its system message."""

    def __init__(self, tokenizer: "Tokenizer", effort: str, date: str, identity: str | None) -> None:
        """Keep the arguments. `effort` is for conversations that name no effort."""
        self._tokenizer = tokenizer
        self._effort = effort
        self._date = date
        # Without an identity, leave `model_identity` undefined, because the template would render None as text.
        self._identity = {} if identity is None else {"model_identity": identity}
        self._seconds = MOST_SECONDS

    def write_script(self, conversation: Conversation, every_turn: bool) -> Script:
        """Write the prompts and completions of the trained turns. See `harmony_text.write_script`.

        Raises:
            ConversationError: the template refuses the conversation, cannot write it, or is not a Harmony template.
        """
        messages = conversation.messages
        trained = [i for i, message in enumerate(messages) if is_trained(message)]
        used = trained if every_turn else trained[-1:]
        # Render each completion without its history. Before a final answer, the template drops the reasoning of earlier
        # tool calls from the history. The prompt still has this reasoning, so the two texts would not match.
        parts = [_Part(_PLACEHOLDER, True)]
        for i in used:
            parts += [_Part([*_PLACEHOLDER, messages[i]], False), _Part(messages[:i], True)]
        opening, *texts = self._render(conversation, parts)
        script = Script([], [], [])
        for alone, prompt in zip(texts[::2], texts[1::2], strict=True):
            completion = _completion(alone, opening)
            script.turns.append(Turn(0, len(script.recent), len(script.recent) + 1, "", completion))
            script.recent.append(prompt)
        return script

    def write_prompt(self, conversation: Conversation, messages: list[Message]) -> str:
        """Write messages of a conversation as a prompt for the next assistant turn.

        Raises:
            ConversationError: the template refuses the messages, or cannot write them.
            TemplateError: the template has a syntax error, or takes too long or too much memory.
        """
        (text,) = self._render(conversation, [_Part(messages, True)])
        return text

    def _render(self, conversation: Conversation, parts: Sequence[_Part]) -> list[str]:
        for part in parts:
            _raise_if_not_writable(part.messages)
        options = {
            "tools": conversation.tools,
            "tokenize": False,
            "reasoning_effort": conversation.reasoning_effort or self._effort,
            **self._identity,
        }
        try:
            texts, used = _renderer.of(self._tokenizer)(_Request(parts, options, self._date), self._seconds)
            "".join(texts).encode()
            self._seconds -= used
        except TimeLimitError as error:
            raise _too_expensive(conversation, f"takes longer than {MOST_SECONDS:g} seconds") from error
        except MemoryError as error:
            raise _too_expensive(conversation, f"needs more than {MOST_MEMORY >> 30} GiB of memory") from error
        except CodeError as error:
            raise _refusal(error) from error
        except UnicodeEncodeError as error:
            raise ConversationError(f"the chat template refuses it: {error}. {_ADVICE}") from error
        return texts


def _completion(alone: str, opening: str) -> str:
    if not alone.startswith(opening) or not alone.endswith(STOP_TOKENS):
        raise ConversationError(
            "the tokenizer's chat template is not a Harmony template: an assistant turn must begin with the"
            f" generation prompt and end with {' or '.join(STOP_TOKENS)}"
        )
    return alone[len(opening) :]


class _Renderer:
    """The process that renders the template of one tokenizer. Another tokenizer, or another template, replaces it."""

    def __init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        self._template: str | None = None
        self._function: LimitedFunction[_Request] | None = None

    def of(self, tokenizer: "Tokenizer") -> LimitedFunction[_Request]:
        """Return the function that renders with this tokenizer's template."""
        if self._function is None or self._tokenizer is not tokenizer or self._template != tokenizer.chat_template:
            if self._function is not None:
                self._function.close()
            self._tokenizer, self._template = tokenizer, tokenizer.chat_template
            self._function = LimitedFunction(partial(_render_parts, tokenizer), MOST_MEMORY)
        return self._function


class _WrongSyntaxError(Exception):
    """The template is not written in Jinja. The message names the line."""


def _render_parts(tokenizer: "Tokenizer", request: _Request) -> list[str]:
    # The template calls `strftime_now` to get today's date. The argument replaces that function.
    try:
        return [
            tokenizer.apply_chat_template(
                part.messages,
                add_generation_prompt=part.for_generation,
                strftime_now=lambda _: request.date,
                **request.options,
            )
            for part in request.parts
        ]
    except TemplateSyntaxError as error:
        raise _WrongSyntaxError(f"line {error.lineno} has a syntax error ({error.message})") from error


_renderer = _Renderer()


def _refusal(error: CodeError) -> UserError | ConversationError:
    what = str(error).rstrip(".")
    if error.name == _WrongSyntaxError.__name__:
        reason = f"chat_template.jinja in model.path: {what}."
        return TemplateError(reason, "Correct the template, or use data.rendering=harmony.")
    return ConversationError(f"the chat template refuses it: {what}. {_ADVICE}")


def _too_expensive(conversation: Conversation, what: str) -> TemplateError:
    """Make an error that ends the reading of rows: thousands of such rows would take hours."""
    return TemplateError(
        f"{conversation.where}: the chat template {what} for these {len(conversation.messages)} messages.",
        "Use data.rendering=harmony, another chat template, or shorter conversations.",
    )


def _raise_if_not_writable(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        what = "text before its answer (channel 'commentary')" if "preamble" in message else ""
        what = f"a result of {message['name']!r}, not of the last call" if "name" in message else what
        if what:
            raise ConversationError(
                f"messages[{i}] has {what}, which the chat template cannot write. Use data.rendering=harmony"
            )
