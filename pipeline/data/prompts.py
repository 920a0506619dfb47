"""Compares the prompts of conversations. The prompt consists of all messages before the first answer."""

import re
import unicodedata

from pipeline.data.conversations import Conversation, Message

_QUOTES = re.compile("[\"'`´“”„‘’‚«»「」]")
_PUNCTUATION = re.compile(r"[.,;:!?…。，、；：！？]+(?=\s|$)")  # keeps the punctuation within numbers


def prompt(conversation: Conversation) -> list[Message]:
    """Return the messages before the first answer. Without an answer, these are all messages."""
    roles = [message["role"] for message in conversation.messages]
    return conversation.messages[: roles.index("assistant")] if "assistant" in roles else conversation.messages


def words(conversation: Conversation) -> str:
    """Return the prompt's roles and texts as they are."""
    return "\0".join(f"{message['role']}\0{message['content']}" for message in prompt(conversation))


def normalize(conversation: Conversation) -> str:
    """Normalize a prompt: apply NFKC, fold case, remove quotes and closing punctuation, and collapse white space.

    Conversations that begin with the same question have the same normalized prompt, however they go on.
    """
    text = unicodedata.normalize("NFKC", words(conversation)).casefold()
    return " ".join(_PUNCTUATION.sub(" ", _QUOTES.sub("", text).replace("\0", "\n")).split())
