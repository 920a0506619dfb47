"""Finds control tokens of chat formats that are written as text. A model would learn to write them as text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from pipeline.data.conversations import Conversation

_CONTROL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?(?:think|thinking|reasoning|analysis)>|\[/?INST\]|<</?SYS>>")
"""Matches control tokens of Harmony and other chat formats, and tags that other models put around reasoning."""
_MOST_TOKENS = 5


def find_control_text(conversation: Conversation) -> list[str]:
    """Return the different control tokens in the texts and calls of a conversation, sorted.

    Harmony's special tokens are not found here, because rows that contain them are refused when the data is read.
    """
    # Few texts have an opening bracket, and looking for it is faster than looking for the pattern.
    texts = (text for text in _texts(conversation) if "<" in text or "[" in text)
    return sorted({token for text in texts for token in _CONTROL.findall(text)})


def describe(rows: int, rows_by_token: Mapping[str, int], first: Sequence[str]) -> str:
    """Describe the rows that have control tokens.

    Args:
        rows: number of these rows.
        rows_by_token: token -> number of rows that have it.
        first: places of the first rows.
    """
    tokens = ", ".join(f"{token} ({count})" for token, count in list(rows_by_token.items())[:_MOST_TOKENS])
    places = "; ".join(first) + (", …" if rows > len(first) else "")
    return (
        f"rows whose text contains control tokens of a chat format: {rows} ({places}). Rows by token: {tokens}. The"
        " model would learn to write these tokens. Remove them from data.path, and put reasoning into 'thinking'."
    )


def _texts(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message["content"]
        yield message.get("thinking", "")
        yield message.get("preamble", "")
        if "tool_calls" in message:
            yield json.dumps(message["tool_calls"], ensure_ascii=False)
