"""Renders conversations with the tokenizer's chat template, as llama.cpp, MLX and transformers do.

The template writes each prompt anew, so a conversation of n turns takes time in proportion to n². A template is a
program that others wrote, so its time and its memory are limited.
"""

import time
from typing import TYPE_CHECKING

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.data.conversations import Conversation, ConversationError, Message, is_trained
from pipeline.data.scripts import Script, Turn
from pipeline.errors import UserError
from pipeline.runs.limits import TimeLimitError, call_limited

if TYPE_CHECKING:
    from pipeline.data.tokenizers import Tokenizer

MOST_SECONDS = 10.0
"""Limit of the time for the prompts and completions of one conversation."""
MOST_MEMORY = 1 << 31
"""Limit of the memory that the template may allocate for one text, in bytes."""
_PLACEHOLDER: list[Message] = [{"role": "user", "content": ""}]


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
        script = Script([], [], [])
        for i in trained if every_turn else trained[-1:]:
            script.turns.append(
                Turn(0, len(script.recent), len(script.recent) + 1, "", self._completion(conversation, i))
            )
            script.recent.append(self.write_prompt(conversation, messages[:i]))
        return script

    def write_prompt(self, conversation: Conversation, messages: list[Message]) -> str:
        """Write messages of a conversation as a prompt for the next assistant turn.

        Raises:
            ConversationError: the template refuses the messages, or cannot write them.
        """
        return self._render(conversation, messages, for_generation=True)

    def _completion(self, conversation: Conversation, index: int) -> str:
        # Render the completion without its history. Before a final answer, the template drops the reasoning of earlier
        # tool calls from the history. The prompt still has this reasoning, so the two texts would not match.
        message = conversation.messages[index]
        alone = self._render(conversation, [*_PLACEHOLDER, message], for_generation=False)
        opening = self._render(conversation, _PLACEHOLDER, for_generation=True)
        if not alone.startswith(opening) or not alone.endswith(STOP_TOKENS):
            raise ConversationError(
                "the tokenizer's chat template is not a Harmony template: an assistant turn must begin with the"
                f" generation prompt and end with {' or '.join(STOP_TOKENS)}"
            )
        return alone[len(opening) :]

    def _render(self, conversation: Conversation, messages: list[Message], *, for_generation: bool) -> str:
        _raise_if_not_writable(messages)
        begin = time.monotonic()
        try:
            text = call_limited(
                lambda: self._tokenizer.apply_chat_template(
                    messages,
                    tools=conversation.tools,
                    tokenize=False,
                    add_generation_prompt=for_generation,
                    reasoning_effort=conversation.reasoning_effort or self._effort,
                    # The template calls `strftime_now` to get today's date. The argument replaces that function.
                    strftime_now=lambda _: self._date,
                    **self._identity,
                ),
                self._seconds,
                MOST_MEMORY,
            )
            text.encode()
            self._seconds -= time.monotonic() - begin
            if self._seconds <= 0:
                raise TimeLimitError
        except TimeLimitError as error:
            raise _too_expensive(conversation, f"takes longer than {MOST_SECONDS:g} seconds") from error
        except MemoryError as error:
            raise _too_expensive(conversation, f"needs more than {MOST_MEMORY >> 30} GiB of memory") from error
        except Exception as error:  # the template is a program that others wrote, so it can raise any error
            raise ConversationError(f"the chat template refuses it: {_first_line(error)}") from error
        return text


def _too_expensive(conversation: Conversation, what: str) -> UserError:
    """Make an error that ends the reading of rows: thousands of such rows would take hours."""
    return UserError(
        f"{conversation.where}: the chat template {what} for these {len(conversation.messages)} messages."
        " Use data.rendering=harmony, another chat template, or shorter conversations."
    )


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0]:.300}"


def _raise_if_not_writable(messages: list[Message]) -> None:
    for i, message in enumerate(messages):
        what = "text before its answer (channel 'commentary')" if "preamble" in message else ""
        what = f"a result of {message['name']!r}, not of the last call" if "name" in message else what
        if what:
            raise ConversationError(
                f"messages[{i}] has {what}, which the chat template cannot write. Use data.rendering=harmony"
            )
