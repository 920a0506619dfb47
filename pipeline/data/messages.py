"""Checks the messages of a row, and converts the forms in which data sets have them.

The usual other forms are converted: content in parts, reasoning under other keys, one message for each Harmony channel,
OpenAI's older `function_call`, and arguments as text. A key that changes the meaning but cannot be honoured, such as a
fractional weight or an image, is an error.
"""

from collections.abc import Mapping, Sequence

from pipeline.data.channels import Part, join_channels
from pipeline.data.conversations import INSTRUCTIONS, ROLES, ConversationError, Message, ToolCall, is_final
from pipeline.data.functions import check_text, make_call, strip_namespace

REASONING_KEYS = ("thinking", "reasoning_content", "reasoning")
"""Keys of an assistant message's reasoning: the chat template's, then those of engines and their clients."""
WEIGHT_KEYS = ("weight", "train", "loss")
"""Keys that say whether an assistant message is trained: OpenAI's, then those of other training programs."""
ROLE_ALIASES = {"function": "tool"}
"""Role of OpenAI's older form -> role of Harmony."""
_HARMONY_KEYS = ("channel", "recipient", "content_type")
_TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id", "name")
MESSAGE_KEYS = frozenset(("role", "content", *_TOOL_KEYS, *_HARMONY_KEYS, *REASONING_KEYS, *WEIGHT_KEYS))
"""Keys of messages that are used. `name` is used in tool messages only."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts whose text is used."""
_PART_ADVICE = {
    **dict.fromkeys(("thinking", "reasoning"), "Put its text into the message's 'thinking'"),
    **dict.fromkeys(("tool_use", "tool_call"), "Write it as the message's 'tool_calls'"),
    **dict.fromkeys(("tool_result", "tool_response"), "Write it as a message of its own with the role 'tool'"),
}
"""Type of a content part -> what to do with it."""
_OTHER_MEDIA = ("image", "images", "image_url", "audio", "audios", "video", "videos", "input_audio", "files")
_PARTIAL_TRAINING = ("train_detail", "weights", "loss_mask")


def parse_messages(messages: Sequence[object], places: Sequence[str] | None = None) -> list[Message]:
    """Check the messages of a row. Messages of one assistant turn, one for each Harmony channel, are joined.

    Args:
        messages: the messages.
        places: the place of each message in the row, for error messages. By default, messages[0] and so on.

    Raises:
        ConversationError: a message is invalid. The error text names it.
    """
    places = places or [f"messages[{i}]" for i in range(len(messages))]
    found = [_part(where, message) for where, message in zip(places, messages, strict=True)]
    _raise_if_late_instructions(found)
    parts = join_channels(found)
    _name_results(parts)
    return [part.message for part in parts]


def _raise_if_late_instructions(parts: Sequence[Part]) -> None:
    roles = [part.message["role"] for part in parts]
    for part, role, before in zip(parts[1:], roles[1:], roles, strict=False):
        if role in INSTRUCTIONS and before not in INSTRUCTIONS:
            raise ConversationError(
                f"{part.where} is a {role} message in mid-conversation, which the template would drop. Move its text to"
                " the first message, or give it the role 'user'"
            )


def _part(where: str, message: object) -> Part:
    """Convert one message of a row."""
    if not isinstance(message, dict):
        raise ConversationError(
            f"{where} is a {type(message).__name__}, not an object with role and content. Give an object"
        )
    role = ROLE_ALIASES.get(str(message.get("role")), message.get("role"))
    if role not in ROLES:
        raise ConversationError(f"{where} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
    _refuse_unsupported(where, message)
    calls = _calls(where, role, message)
    cleaned: Message = {"role": role, "content": _content(where, message, may_be_absent=calls is not None)}
    _add_reasoning(where, cleaned, message)
    if calls is not None:
        cleaned["tool_calls"] = [_tool_call(where, calls)]
    if role == "tool" and isinstance(message.get("name"), str):
        cleaned["name"] = strip_namespace(message["name"])
    found = (_name(where, key, message) for key in ("channel", "recipient")) if role == "assistant" else (None, None)
    channel, recipient = found
    call_id = message.get("tool_call_id") if role == "tool" else _call_id(message)
    return Part(where, cleaned, channel, recipient, _weight(where, role, message), str(call_id) if call_id else None)


def _refuse_unsupported(where: str, message: Mapping[str, object]) -> None:
    for key in _OTHER_MEDIA:
        if message.get(key):
            raise ConversationError(f"{where} has {key!r}, but the model reads only text. Remove the row or the key")
    for key in _PARTIAL_TRAINING:
        if message.get(key) is not None:
            raise ConversationError(f"{where} has {key!r}, but a message is trained whole or not at all: use weight")
    if message.get("refusal") and not message.get("content"):
        raise ConversationError(f"{where} has its text in 'refusal'. Put the text into 'content'")


def _content(where: str, message: Mapping[str, object], *, may_be_absent: bool) -> str:
    content = message.get("content")
    if content is None and may_be_absent:
        return ""
    if isinstance(content, (list, tuple)):
        content = "".join(_text_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    return _text(f"{where}.content", content)


def _name(where: str, key: str, message: Mapping[str, object]) -> str | None:
    name = message.get(key)
    if name is not None and not isinstance(name, str):
        raise ConversationError(_not_text(f"{where}.{key}", name))
    return name or None


def _text_part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ConversationError(f"{where} is {type(part).__name__}, not a text part. Give a text")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        advice = _PART_ADVICE.get(str(kind), "Remove the part or the row")
        raise ConversationError(
            f"{where} is of type {kind!r}, but the model reads only text ({', '.join(TEXT_PARTS)}). {advice}"
        )
    return _text(f"{where}.text", part.get("text"))


def _text(where: str, text: object) -> str:
    if not isinstance(text, str):
        raise ConversationError(_not_text(where, text))
    check_text(where, text)
    return text


def _not_text(where: str, value: object) -> str:
    advice = "Write it as text in JSON" if isinstance(value, (dict, list, tuple)) else "Give a text, which may be empty"
    return f"{where} is {type(value).__name__}, not text. {advice}"


def _add_reasoning(where: str, cleaned: Message, message: Mapping[str, object]) -> None:
    found = {key: message[key] for key in REASONING_KEYS if message.get(key)}
    if not found:
        return
    key, *others = found
    if cleaned["role"] != "assistant":
        raise ConversationError(
            f"{where} has {key!r}, but its role is {cleaned['role']!r}, not 'assistant'. Remove the key"
        )
    for other in others:
        if found[other] != found[key]:
            raise ConversationError(f"{where} has different reasoning in {key!r} and {other!r}. Keep one of them")
    cleaned["thinking"] = _text(f"{where}.{key}", found[key])


def _weight(where: str, role: str, message: Mapping[str, object]) -> int | None:
    """Return 0 or 1, or None if the message states no weight."""
    found: dict[str, int] = {}
    for key in WEIGHT_KEYS:
        weight = message.get(key)
        if weight is None:
            continue
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            raise ConversationError(f"{where} has {key}={weight!r}. It must be 0 (not trained) or 1 (trained)")
        if weight and role != "assistant":
            raise ConversationError(f"{where} has {key}={weight!r}, but only assistant messages are trained")
        found[key] = int(weight)
    if len({*found.values()}) > 1:
        raise ConversationError(f"{where} has contradicting values of {' and '.join(found)}")
    return next(iter(found.values()), None)


def _calls(where: str, role: str, message: Mapping[str, object]) -> object:
    """Return the message's list of tool calls, or None if it calls no tool."""
    calls, older = message.get("tool_calls") or None, message.get("function_call") or None
    if older is not None:
        if calls is not None:
            raise ConversationError(f"{where} has 'tool_calls' and 'function_call'. Keep one of them")
        calls = [{"function": older}]
    if calls is not None and role != "assistant":
        key = "tool_calls" if older is None else "function_call"
        raise ConversationError(f"{where} has {key!r}, but its role is {role!r}, not 'assistant'. Remove the key")
    return calls


def _call_id(message: Mapping[str, object]) -> object:
    calls = message.get("tool_calls")
    first = calls[0] if isinstance(calls, (list, tuple)) and calls else None
    return first.get("id") if isinstance(first, dict) else None


def _tool_call(where: str, tool_calls: object) -> ToolCall:
    if not isinstance(tool_calls, (list, tuple)) or len(tool_calls) != 1:
        raise ConversationError(
            f"{where}.tool_calls must be a list of exactly one call, as Harmony requires. Give each call a"
            " message of its own"
        )
    call = tool_calls[0]
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(f"{where}.tool_calls[0] has no function name. Give an object with name and arguments")
    return make_call(f"{where}.tool_calls[0]", function["name"], function.get("arguments"))


def _name_results(parts: list[Part]) -> None:
    """Find the function of each tool message: by the id of its call, by its name, or else the last one called.

    The key `name` is left only where the function is not the one that was called last.

    A call is unanswered until a result follows it. A result with the id of a call answers that call alone. A result
    without such an id answers all calls before it. If calls have no ids, at most one may be unanswered before a result
    that has an id but no name.

    Raises:
        ConversationError: a tool message has no earlier call, has the id of no earlier call, or names a function that
            no earlier message calls.
    """
    by_id: dict[str, str] = {}
    called: list[str] = []
    is_answered, unanswered = False, 0
    for part in parts:
        message = part.message
        if message["role"] == "assistant":
            is_answered = is_final(message)
        if "tool_calls" in message:
            called.append(message["tool_calls"][0]["function"]["name"])
            by_id |= {part.call_id: called[-1]} if part.call_id else {}
            unanswered += 1
        elif message["role"] == "tool":
            own, of_id = message.pop("name", None), by_id.get(part.call_id or "")
            if not called:
                raise ConversationError("has a tool message without an earlier assistant message with 'tool_calls'")
            if part.call_id and of_id is None:
                _raise_if_unclear(part, by_id, is_clear=unanswered < 2 or own is not None)
            if own is not None and own not in ({of_id} if of_id else called):
                what = f"tool_call_id is of a call of {of_id!r}" if of_id else "no earlier message calls it"
                raise ConversationError(f"{part.where} is a result of {own!r}, but {what}")
            if is_answered:
                raise ConversationError(f"{part.where} is a tool message, but its call is already answered")
            if (name := of_id or own or called[-1]) != called[-1]:
                message["name"] = name
            unanswered = 0 if of_id is None else max(unanswered - 1, 0)


def _raise_if_unclear(part: Part, by_id: Mapping[str, str], *, is_clear: bool) -> None:
    """Raise if a result has an id that no earlier call has, or if its call is unknown because calls have no ids.

    Args:
        part: the message with the result.
        by_id: id of an earlier call -> name of its function.
        is_clear: whether the call is known without an id: one call is unanswered, or the result names its function.
    """
    if by_id:
        known = ", ".join(map(repr, by_id))
        raise ConversationError(
            f"{part.where} has tool_call_id={part.call_id!r:.80}, but the earlier calls have {known:.200}. Correct the"
            " id, or remove it if the result is of the last call"
        )
    if not is_clear:
        raise ConversationError(
            f"{part.where} has tool_call_id={part.call_id!r:.80}, but the calls before it have no ids, so its call is"
            " unknown. Give each call its 'id', or put each result after its call"
        )
