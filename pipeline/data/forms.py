"""Recognizes the usual forms of rows, to advise settings for rows that the present settings do not fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_QUESTIONS = ("prompt", "question", "query", "instruction", "problem", "user", "input")
_ANSWERS = ("completion", "response", "answer", "output", "solution", "assistant", "target")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = {
    **dict.fromkeys(("human", "person"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "chatbot", "bard", "claude"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
}
"""Role of other formats -> role of Harmony."""
_AS_MESSAGES = "Give each conversation as a list 'messages' of objects with role and content."


@dataclass(frozen=True)
class Form:
    """A form of rows, and the settings that read it.

    Attributes:
        name: the form in words, in the plural.
        group: the choice of the config group `data` whose settings come closest.
        columns: name in data.columns -> column, without the values that the group sets.
        own: name in data.columns -> column, as the group sets them.
        roles: data.roles, as the group sets them.
        more_roles: data.roles, without the values that the group sets.
    """

    name: str
    group: str
    columns: Mapping[str, str | None] = field(default_factory=dict)
    own: Mapping[str, str | None] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    more_roles: Mapping[str, str] = field(default_factory=dict)

    def advice(self, key: str) -> str:
        """Return a sentence with the settings that read such rows. `key` is the key of the data set's settings."""
        if key == "data":
            settings = [f"data={self.group}"]
            columns, roles = self.columns, self.more_roles
        else:  # config groups set `data` only
            settings = []
            columns, roles = {**self.own, **self.columns}, {**self.roles, **self.more_roles}
        settings += [f"{key}.columns.{name}={'null' if value is None else value}" for name, value in columns.items()]
        if roles:
            settings.append(f"'{key}.roles={{{', '.join(f'{old}: {new}' for old, new in roles.items())}}}'")
        return f"These look like {self.name}. Use {' '.join(settings)}."


@dataclass(frozen=True)
class Unsupported:
    """A form of rows that no settings read. `name` is the form in words, `remedy` a sentence."""

    name: str
    remedy: str

    def advice(self, key: str) -> str:
        """Return sentences with the remedy. `key` is as in `Form.advice`, and is not needed."""
        return f"These look like {self.name}. {self.remedy}"


def recognize(row: Mapping[str, object]) -> Form | Unsupported | None:
    """Return the form of a row, or None if the row has no form that is known here."""
    found: list[Form | Unsupported] = [*_unsupported(row), *_lists(row), *_pairs(row)]
    return next(iter(found), None)


def role_of(name: str) -> str | None:
    """Return Harmony's name for a role of another format, or None if the role is unknown."""
    return _ROLES.get(name.lower())


def _unsupported(row: Mapping[str, object]) -> Iterator[Unsupported]:
    if [name for name, value in row.items() if value] == ["text"]:
        yield Unsupported("texts without turns", f"Only conversations are trained. {_AS_MESSAGES}")
    items = row.get("output")
    is_pair = _is_chat(row.get("input")) and _is_answers(items)
    if "input" in row and _as_list(items) and not is_pair:
        yield Unsupported("rows of OpenAI's Responses API", f"Join their input and output. {_AS_MESSAGES}")


def _is_answers(items: object) -> bool:
    """Return whether a value is a list of messages of the assistant."""
    return _is_chat(items) and all(isinstance(i, dict) and i.get("role") == "assistant" for i in _as_list(items))


def _as_list(value: object) -> list[object]:
    return [*value] if isinstance(value, (list, tuple)) else []


def _lacks_answer(messages: object) -> bool:
    return not any(isinstance(each, dict) and each.get("role") == "assistant" for each in _as_list(messages))


def _lists(row: Mapping[str, object]) -> Iterator[Form]:
    """Yield the form of each column that holds a list of messages."""
    answer = next((name for name in ("completion", "chosen") if _is_chat(row.get(name))), None)
    if _is_chat(row.get("prompt")) and answer is not None:
        own: dict[str, str | None] = {"messages": None, "prompt": "prompt", "completion": "completion"}
        name = "conversational prompts and completions"
        yield Form(name, "prompt_completion", _others({"completion": answer}), own)
    for asked in (name for name in ("prompt", "input") if _is_chat(row.get(name)) and _lacks_answer(row[name])):
        for name in _ANSWERS:
            if isinstance(row.get(name), str) or _is_answers(row.get(name)):
                own = {"messages": None, "prompt": "prompt", "completion": "completion"}
                columns = _others({"prompt": asked, "completion": name})
                yield Form("conversational prompts and completions", "prompt_completion", columns, own)
    for column, value in row.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else None
        if not isinstance(first, dict):
            continue
        name = "preference pairs, of which only the preferred answer can be trained" if column == "chosen" else ""
        if {"role", "content"} <= first.keys():
            own = {"messages": "messages"}
            columns = {} if column == "messages" else {"messages": column}
            yield Form(name or f"chats in the column {column!r}", "chat", columns, own)
        elif {"from", "value"} <= first.keys():
            own = {"messages": "conversations", "role": "from", "content": "value"}
            columns = {} if column == "conversations" else {"messages": column}
            yield Form(name or "ShareGPT rows", "sharegpt", columns, own, _SHAREGPT_ROLES)


def _is_chat(value: object) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else None
    return isinstance(first, dict) and {"role", "content"} <= first.keys()


def _pairs(row: Mapping[str, object]) -> Iterator[Form]:
    """Yield the forms of a row that has a question and an answer in two columns of text."""
    if {"instruction", "output"} <= row.keys():
        own: dict[str, str | None] = {"messages": None, "prompt": "instruction"}
        own |= {"input": "input", "completion": "output"}
        yield Form("Alpaca rows", "alpaca", {} if "input" in row else {"input": None}, own)
    text = [name for name, value in row.items() if isinstance(value, str)]
    question = next((name for name in _QUESTIONS if name in text), None)
    pair: dict[str, str | None] = {"messages": None, "prompt": "prompt", "completion": "completion"}
    if question is not None and "chosen" in text:
        name = "preference pairs, of which only the preferred answer can be trained"
        yield Form(name, "prompt_completion", _others({"prompt": question, "completion": "chosen"}), pair)
    answer = next((name for name in _ANSWERS if name in text and name != question), None)
    if question is not None and answer is not None:
        columns = _others({"prompt": question, "completion": answer})
        yield Form("questions and answers", "prompt_completion", columns, pair)


def _others(columns: dict[str, str]) -> dict[str, str | None]:
    """Return the columns that differ from those in conf/data/prompt_completion.yaml."""
    return {name: column for name, column in columns.items() if name != column}
