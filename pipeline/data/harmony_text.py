"""Writes conversations as Harmony text, as openai-harmony does for vLLM, SGLang and TensorRT-LLM.

The package openai-harmony is not used here. It needs a vocabulary that it downloads, and returns tokens of this
vocabulary only, so it cannot render for another tokenizer. doctor and the tests compare every token with its own.
"""

import json

from pipeline.data.conversations import INSTRUCTIONS, Conversation, Message, is_final, is_trained
from pipeline.data.scripts import Script, Turn
from pipeline.data.tool_schemas import declare_functions

OPENING = "<|start|>assistant"
"""The end of a prompt. The model continues with its turn."""
CALL_TYPE = "<|constrain|>json"
"""The content type of a call. The released models write it. The chat template writes `json`."""
_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."


def write_script(conversation: Conversation, effort: str, date: str, identity: str | None, every_turn: bool) -> Script:
    """Write the prompts and completions of the trained turns.

    Args:
        conversation: the conversation. Its instructions have the line of the reasoning language.
        effort, date, identity: for the system message. Without an identity, openai-harmony's is used.
        every_turn: whether all trained turns are written, or only the last of them.
    """
    trained = [i for i, message in enumerate(conversation.messages) if is_trained(message)]
    chosen = {*trained} if every_turn else {*trained[-1:]}
    return _write(conversation, _head(conversation, effort, date, identity), chosen)


def write_prompt(conversation: Conversation, effort: str, date: str, identity: str | None) -> str:
    """Write the whole conversation as a prompt for the next assistant turn. The arguments are as in `write_script`."""
    end = len(conversation.messages)
    script = _write(conversation, _head(conversation, effort, date, identity), {end})
    return script.prompt(script.turns[-1])


def _write(conversation: Conversation, head: list[str], chosen: set[int]) -> Script:
    """Write a script with the turns at the given indices. The last index may be after the last message.

    The prompts have the reasoning of the calls after the last answer. Earlier reasoning is dropped, as at inference.
    """
    messages = conversation.messages
    script = Script(head, [], [])
    answered, start, called = len(head), 0, ""
    for i, message in enumerate([*messages, None][: max(chosen, default=-1) + 1]):
        if i in chosen:
            completion = "" if message is None else _write_completion(message)
            script.turns.append(Turn(answered, start, len(script.recent), OPENING, completion))
        if message is None or message["role"] in INSTRUCTIONS:
            continue
        script.settled.append(_write_message(message, called, with_reasoning=False))
        if is_final(message):
            answered, start = len(script.settled), len(script.recent)
        else:
            script.recent.append(_write_message(message, called, with_reasoning=True))
        called = message["tool_calls"][0]["function"]["name"] if "tool_calls" in message else called
    return script


def _head(conversation: Conversation, effort: str, date: str, identity: str | None) -> list[str]:
    """Return the system message, and the developer message if there are instructions or tools."""
    first = conversation.messages[0]
    text = first["content"] if first["role"] in INSTRUCTIONS else ""
    lines = [
        f"{_IDENTITY if identity is None else identity}\nKnowledge cutoff: 2024-06\nCurrent date: {date}\n",
        f"Reasoning: {effort}\n",
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    ]
    lines += ["Calls to these tools must go to the commentary channel: 'functions'."] if conversation.tools else []
    sections = [f"# Instructions\n\n{text}"] if text else []
    if conversation.tools:
        sections.append(declare_functions([tool["function"] for tool in conversation.tools]))
    system, developer = "\n".join(lines), "\n\n".join(sections)
    head = [f"<|start|>system<|message|>{system}<|end|>"]
    return [*head, f"<|start|>developer<|message|>{developer}<|end|>"] if developer else head


def _write_message(message: Message, called: str, *, with_reasoning: bool) -> str:
    """Write a message of the history. `called` is the function that was called last."""
    role = message["role"]
    if role == "assistant":
        *before, last = _parts(message)
        kept = before if with_reasoning else [part for part in before if not part.startswith("<|channel|>analysis")]
        end = "<|call|>" if "tool_calls" in message else "<|end|>"
        return "".join(f"{OPENING}{part}<|end|>" for part in kept) + f"{OPENING}{last}{end}"
    if role == "tool":
        author = f"functions.{message.get('name', called)} to=assistant<|channel|>commentary"
        return f"<|start|>{author}<|message|>{message['content']}<|end|>"
    return f"<|start|>{role}<|message|>{message['content']}<|end|>"


def _write_completion(message: Message) -> str:
    """Write what the model generates after `<|start|>assistant`."""
    end = "<|call|>" if "tool_calls" in message else "<|return|>"
    return f"<|end|>{OPENING}".join(_parts(message)) + end


def _parts(message: Message) -> list[str]:
    """Write the messages of an assistant turn, each without its opening and its end. The answer or call is last."""
    is_call = "tool_calls" in message
    thinking, preamble = message.get("thinking"), message["content"] if is_call else message.get("preamble")
    parts = [f"<|channel|>analysis<|message|>{thinking}"] if thinking else []
    parts += [f"<|channel|>commentary<|message|>{preamble}"] if preamble else []
    if not is_call:
        return [*parts, f"<|channel|>final<|message|>{message['content']}"]
    function = message["tool_calls"][0]["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return [*parts, f" to=functions.{function['name']}<|channel|>commentary {CALL_TYPE}<|message|>{arguments}"]
