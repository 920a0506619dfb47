"""Joins the messages of an assistant turn if a data set has one message for each Harmony channel.

The parts of a turn are, in this order: reasoning (analysis), text for the user that precedes the rest (commentary), and
a tool call (commentary, with a recipient) or the answer (final).
"""

from dataclasses import dataclass, replace

from pipeline.data.conversations import ConversationError, Message, ToolCall
from pipeline.data.functions import make_call, strip_namespace

_CHANNELS = ("analysis", "commentary", "final")


@dataclass(frozen=True)
class Part:
    """A message of a row, with the keys that say what it belongs to.

    Attributes:
        where: the message's place in the row, for messages.
        message: the message in the chat template's form.
        channel, recipient: of an assistant message in Harmony's form, else None.
        weight: 0 or 1, or None if the message states no weight.
        call_id: id of the call that the message makes, or whose result it is.
    """

    where: str
    message: Message
    channel: str | None
    recipient: str | None
    weight: int | None
    call_id: str | None


def join_channels(parts: list[Part]) -> list[Part]:
    """Join the messages of each assistant turn. Messages without a channel are turns of their own.

    Raises:
        ConversationError: a channel is unknown, or the parts of a turn are incomplete, or in another order.
    """
    for part in parts:
        if part.channel is not None and part.channel not in _CHANNELS:
            raise ConversationError(f"{part.where} has the unknown channel {part.channel!r}; use {_list(_CHANNELS)}")
    joined: list[Part] = []
    pending: list[Part] = []
    for part in parts:
        ends_turn = bool(pending) and "tool_calls" in part.message
        if part.channel is None and part.recipient is None and not ends_turn:
            _raise_if_any(pending)
            joined.append(_weighted(part, part.weight))
            continue
        pending.append(part)
        if part.channel == "final" or part.recipient is not None or "tool_calls" in part.message:
            joined.append(_join(pending))
            pending = []
    _raise_if_any(pending)
    return joined


def _raise_if_any(pending: list[Part]) -> None:
    if pending:
        last = pending[-1]
        raise ConversationError(
            f"{last.where} is in the channel {last.channel!r}, but no message of the same turn in the channel 'final',"
            " and no call, follows it"
        )


def _join(parts: list[Part]) -> Part:
    *before, last = parts
    calls = last.recipient if last.recipient is not None else "tool_calls" if "tool_calls" in last.message else None
    if calls is not None and last.channel not in (None, "commentary"):
        raise ConversationError(f"{last.where} calls {calls!r} in the channel {last.channel!r}, not in 'commentary'")
    if [part.channel for part in before] not in ([], ["analysis"], ["commentary"], ["analysis", "commentary"]):
        raise ConversationError(
            f"{before[0].where} to {last.where} are one turn. Its messages before the last one must be at most one in"
            " the channel 'analysis', then at most one in the channel 'commentary'"
        )
    weights = {1 if part.weight is None else part.weight for part in parts}
    if len(weights) > 1:
        raise ConversationError(f"{before[0].where} to {last.where} are one turn, but have different weights")
    return _weighted(replace(last, message=_merge(before, last), channel=None, recipient=None), weights.pop())


def _merge(before: list[Part], last: Part) -> Message:
    texts = {str(part.channel): part.message["content"] for part in before}
    message: Message = {**last.message}
    if last.recipient is not None:
        message = {"role": "assistant", "content": "", "tool_calls": [_call(last)]}
    reasoning = [part.message["thinking"] for part in (*before, last) if part.message.get("thinking")]
    if texts.get("analysis"):
        reasoning.append(texts["analysis"])
    if len(reasoning) > 1:
        raise ConversationError(f"{last.where} has reasoning of its own and in the channel 'analysis'")
    if reasoning:
        message["thinking"] = reasoning[0]
    if texts.get("commentary"):
        if "tool_calls" not in message:
            message["preamble"] = texts["commentary"]
        elif message["content"]:
            raise ConversationError(f"{last.where} has text of its own and in the channel 'commentary'")
        else:
            message["content"] = texts["commentary"]
    return message


def _call(part: Part) -> ToolCall:
    recipient = str(part.recipient)
    if strip_namespace(recipient) == recipient:
        raise ConversationError(
            f"{part.where} has the recipient {recipient!r}, but only functions.<name> can be called."
            " Make the call a function, or remove the row"
        )
    if "tool_calls" in part.message:
        raise ConversationError(f"{part.where} has 'tool_calls' and 'recipient'. Keep one of them")
    return make_call(part.where, recipient, part.message["content"])


def _weighted(part: Part, weight: int | None) -> Part:
    if weight == 0 and part.message["role"] == "assistant":
        return replace(part, message={**part.message, "weight": 0})
    return part


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)
