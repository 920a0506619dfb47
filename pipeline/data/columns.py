"""Converts the rows of any data set to chat form. The settings in `data.columns` name the columns to read.

To add a data set, add a file to conf/data/. No change to this module is needed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipeline.config import ColumnsConfig, DataConfig
from pipeline.data import forms, unused
from pipeline.data.conversations import ROLES, ConversationError
from pipeline.data.files import SPLIT_OF, ArrowRow, TextRow
from pipeline.data.messages import REASONING_KEYS, ROLE_ALIASES
from pipeline.data.unused import Unused
from pipeline.errors import did_you_mean
from pipeline.runs.foreign_files import MOST_DEPTH, describe_error, is_too_deep, parse_json

_NEEDED = ("messages", "prompt", "completion")
_OPTIONS = ("tools", "reasoning_effort", "reasoning_language")
_MESSAGE_KEYS = ("role", "content", "thinking")
_MOST_NAMES = 40
_OLDER_TOOLS = "functions"  # OpenAI's older column of function schemas, beside `function_call` in the messages
_SPLIT = "split"


class Columns:
    """Converts the rows of one data set, and remembers which wanted columns were found so far."""

    def __init__(
        self, key: str, data: DataConfig, expected: Mapping[str, str] | None = None, expected_key: str = "{}"
    ) -> None:
        """Read the names of the columns from the settings.

        Args:
            key: key of the data set's settings, for messages. Examples: `data`, `data.blend[0]`.
            data: settings of the data set. Only `path`, `columns`, `roles` and `filter` are used.
            expected: name of a value that scorers need -> column that holds the value.
            expected_key: key of the setting that names such a column, for messages. In the key, {} stands for the name
                of the value.
        """
        self._key = key
        self._data = data
        self._expected = expected or {}
        self._expected_key = expected_key
        self._wanted = dict(self._looked_for())
        self._found: set[str] = set()
        self._kept_one = False
        self._others: dict[str, None] = {}  # ordered set: columns of the rows that lack a wanted column
        self._unlike: Mapping[str, object] | None = None  # the first row that lacks a wanted column
        self._keys: dict[str, None] = {}  # ordered set: keys of the messages
        self._unused = Unused([], {})  # of the last row
        self._places: list[str] | None = None  # of the last row's messages
        self._splits: Counter[str] = Counter()  # value of an unused column `split` -> number of rows

    def require_object(self, row: object) -> Mapping[str, object]:
        """Return the row if it is a JSON object.

        Raises:
            ConversationError: the row is another JSON value, such as a list, or is nested too deeply.
        """
        if not isinstance(row, dict):
            raise ConversationError(f"is a {type(row).__name__}, not an object with {next(iter(self._wanted))!r}")
        if isinstance(row, ArrowRow) and is_too_deep(row):  # rows in JSON were checked when they were parsed
            raise ConversationError(f"is nested more than {MOST_DEPTH} levels deep")
        return row

    def to_chat_row(self, row: Mapping[str, object]) -> dict[str, object] | None:
        """Return the row in the form that `harmony.parse_conversation` takes, or None if data.filter drops it.

        Raises:
            ConversationError: a column that every row needs is missing, or is not text.
        """
        found = {column: self._find(row, column) for column in self._data.filter}
        if not all(_is_among(found[column], values, row) for column, values in self._data.filter.items()):
            return None
        self._kept_one = True
        columns = {name: column for name, column in vars(self._data.columns).items() if name not in _MESSAGE_KEYS}
        # Look up all columns before raising an error, so that `list_missing` names only columns that no row has.
        values = {name: self._find(row, column) for name, column in columns.items() if column is not None}
        for name in _NEEDED:
            if name in values and values[name] is None:
                if columns[name] in row:
                    raise ConversationError(f"has nothing in {columns[name]!r}")
                self._unlike = self._unlike or row
                raise ConversationError(f"has no {columns[name]!r} (it has: {', '.join(_leaves(row)) or 'nothing'})")
        values = {name: _drop_nulls(value) for name, value in values.items()} if isinstance(row, ArrowRow) else values
        messages = self._messages(row, values["messages"]) if "messages" in values else self._single_turn(row, values)
        has_instructions = _has_instructions(messages)
        asked = self._add_system(values.get("system"), messages)
        self._places = self._find_places(values, messages, has_system=asked is not messages)
        tools = self._tools(row, values.get("tools"))
        self._note_unused(row, values, has_instructions)
        return {"messages": asked, **{name: values.get(name) for name in _OPTIONS}, "tools": tools}

    def unused_of_row(self) -> Unused:
        """Return the unused parts of the row that `to_chat_row` has converted last."""
        return self._unused

    def places_of_row(self) -> list[str] | None:
        """Return the places of the messages of the row that `to_chat_row` has converted last. See `parse_messages`."""
        return self._places

    def read_expected(self, row: Mapping[str, object]) -> dict[str, str]:
        """Return the values that scorers need, as text. `row` must be a row that data.filter keeps.

        Raises:
            ConversationError: a column is missing, or is neither text nor a number.
        """
        found = {name: self._find(row, column) for name, column in self._expected.items()}
        for name, value in found.items():
            if not isinstance(value, (str, int, float)):
                kind = "is not there" if value is None else f"is a {type(value).__name__}, neither text nor a number"
                raise ConversationError(
                    f"{self._expected[name]!r}, which {self._expected_key.format(name)} names, {kind}"
                )
        return {name: str(value) for name, value in found.items()}

    def list_missing(self) -> list[str]:
        """Return one message for each wanted column or key that no row had. Call this after the last row."""
        there = ", ".join(self._others) or "none"
        is_table = isinstance(self._unlike, TextRow)
        header = " Line 1 of a CSV or TSV file must hold the names of the columns." if is_table else ""
        # Report a column only if rows were searched for it. Unreadable rows are not searched.
        # In rows that the filter drops, only the filter's columns are searched.
        missing = [
            (column, setting)
            for column, setting in self._wanted.items()
            if column not in self._found and (self._kept_one or (column in self._data.filter and self._others))
        ]
        found = [
            f"{setting}={column!r}: no row of {self._data.path} has that column."
            f"{did_you_mean(column, self._others)} Existing columns: {there}.{header}"
            for column, setting in missing
        ]
        needed = {f"{self._key}.columns.{name}" for name in (*_NEEDED, "input")}
        if any(setting in needed for _, setting in missing):
            found[-1] += self._advice(self._unlike)
        return [*found, *self._missing_keys()]

    def list_other_splits(self) -> list[str]:
        """Return a message if a column `split` says that rows belong to another split. Call this after the last row."""
        wanted = SPLIT_OF.get(self._data.split, self._data.split)
        if not {*self._splits} <= {*SPLIT_OF} or {SPLIT_OF[name] for name in self._splits} <= {wanted}:
            return []
        there = ", ".join(f"{name} in {count} rows" for name, count in self._splits.items())
        own = [name for name in self._splits if SPLIT_OF[name] == wanted] or [*self._splits]
        rows = f"[{', '.join(own)}]"
        short, whole = f"'data.filter.{_SPLIT}={rows}'", f"'{self._key}.filter={{{_SPLIT}: {rows}}}'"
        return [
            f"{self._data.path}: the column {_SPLIT!r} says {there}, but all of them would be used. Choose the rows:"
            f" {short if self._key == 'data' else whole}"
        ]

    def _missing_keys(self) -> list[str]:
        """Return one message for each key of messages that no message has."""
        usual = ColumnsConfig()
        wanted = {name: getattr(self._data.columns, name) for name in _MESSAGE_KEYS}
        optional = {"thinking"} if wanted["thinking"] == usual.thinking else set()
        return [
            f"{self._key}.columns.{name}={key!r}: no message of {self._data.path} has that key."
            f"{did_you_mean(key, self._keys)} Existing keys: {', '.join(self._keys)}."
            + (self._advice(self._unlike) if name == "role" else "")
            for name, key in wanted.items()
            if self._keys and key not in self._keys and name not in optional
        ]

    def _advice(self, row: Mapping[str, object] | None) -> str:
        form = None if row is None else forms.recognize(row)
        return "" if form is None else f" {form.advice(self._key)}"

    def _note_unused(self, row: Mapping[str, object], values: Mapping[str, object], has_instructions: bool) -> None:
        """Remember the unused parts. Raise ConversationError if one of them changes the meaning."""
        columns = self._data.columns
        names = ("messages",) if "messages" in values else ("prompt", "completion")
        messages = {str(getattr(columns, name)): values[name] for name in names if name in values}
        used = {
            *self._wanted,
            *(column for name, column in vars(columns).items() if column and name not in _MESSAGE_KEYS),
        }
        used |= {_OLDER_TOOLS} if self._uses_older_tools(row) else set()
        found = unused.find_unused(row, columns, used, messages)
        unused.raise_if_needed(row, columns, found, self._key)
        if isinstance(row, ArrowRow) and any(
            _has_null_arguments(items) for items in (row.get(str(n)) for n in messages)
        ):
            found.append(unused.NULL_ARGUMENTS)
        self._unused = Unused(found, unused.settings_for(row, columns, has_instructions))
        split = row.get(_SPLIT)
        if _SPLIT in found and isinstance(split, str):
            self._splits[split.lower()] += 1

    def _add_system(self, text: object, messages: object) -> object:
        """Put the instructions of a column before the messages, unless the messages begin with the same text."""
        if text is None or text == "" or not isinstance(messages, list):
            return messages
        column = self._data.columns.system
        if not isinstance(text, str):
            raise ConversationError(
                f"{column!r} is {type(text).__name__}, not text. If it does not hold instructions, set"
                f" {self._key}.columns.system=null"
            )
        same = _has_instructions(messages) and messages[0]["content"] == text
        return messages if same else [{"role": "system", "content": text}, *messages]

    def _find_places(self, values: Mapping[str, object], messages: object, *, has_system: bool) -> list[str] | None:
        """Return the place of each message in the row, or None if the messages are no list."""
        if not isinstance(messages, (list, tuple)):
            return None
        columns, prompt = self._data.columns, values.get("prompt")
        if "messages" in values:
            places = [f"messages[{i}]" for i in range(len(messages))]
        elif isinstance(prompt, (list, tuple)):
            answers = [f"{columns.completion}[{i}]" for i in range(len(messages) - len(prompt))]
            answers = [str(columns.completion)] if isinstance(values.get("completion"), str) else answers
            places = [*(f"{columns.prompt}[{i}]" for i in range(len(prompt))), *answers]
        else:
            places = [str(columns.prompt), str(columns.completion)][: len(messages)]
        return [str(columns.system), *places] if has_system else places

    def _tools(self, row: Mapping[str, object], tools: object) -> object:
        if not self._uses_older_tools(row):
            return tools
        if tools:
            raise ConversationError(f"has {self._data.columns.tools!r} and {_OLDER_TOOLS!r}. Keep one of them")
        return _drop_nulls(row[_OLDER_TOOLS]) if isinstance(row, ArrowRow) else row[_OLDER_TOOLS]

    def _uses_older_tools(self, row: Mapping[str, object]) -> bool:
        return self._data.columns.tools == ColumnsConfig.tools and bool(row.get(_OLDER_TOOLS))

    def _looked_for(self) -> Iterator[tuple[str, str]]:
        """Yield (column, key of its setting) for each required column and each configured optional column."""
        usual = ColumnsConfig()
        for name, column in vars(self._data.columns).items():
            must_be_there = name in _NEEDED or column != getattr(usual, name)
            if name not in _MESSAGE_KEYS and column is not None and must_be_there:
                yield column, f"{self._key}.columns.{name}"
        yield from ((column, f"{self._key}.filter") for column in self._data.filter)
        yield from ((column, self._expected_key.format(name)) for name, column in self._expected.items())

    def _find(self, row: Mapping[str, object], path: str) -> object:
        """Return the value of the column `path`.

        If there is no such column, read `path` as a dotted path. If both fail, return None.
        """
        value: object = row
        for part in [path] if path in row else path.split("."):
            if not isinstance(value, dict) or part not in value:
                if path in self._wanted and len(self._others) < _MOST_NAMES:
                    self._others |= dict.fromkeys(_leaves(row))
                return None
            value = value[part]
        self._found.add(path)
        return value

    def _single_turn(self, row: Mapping[str, object], values: Mapping[str, object]) -> object:
        """Make messages of a prompt and a completion: two texts, or two lists of messages, as TRL has them."""
        if isinstance(values["prompt"], (list, tuple)):
            return self._conversational(row, values)
        for name in ("prompt", "completion"):
            column = getattr(self._data.columns, name)
            if column is not None and not isinstance(values[name], str):
                raise ConversationError(f"{column!r} is {type(values[name]).__name__}, not text")
        question = {"role": "user", "content": self._question(values)}
        return [question, self._answer(values)] if "completion" in values else [question]

    def _answer(self, values: Mapping[str, object]) -> dict[str, object]:
        return {"role": "assistant", "content": values["completion"], "thinking": values.get("reasoning")}

    def _conversational(self, row: Mapping[str, object], values: Mapping[str, object]) -> object:
        """Join a list of messages and its completion. Answers in the prompt are context, and are not trained."""
        if values.get("input"):
            raise ConversationError(f"{self._data.columns.input!r} cannot follow a prompt that is a list of messages")
        columns = self._data.columns
        asked, answer = self._messages(row, values["prompt"], columns.prompt), values.get("completion")
        if not isinstance(asked, list) or "completion" not in values:
            return asked
        context = [{**m, "weight": 0} if isinstance(m, dict) and m["role"] == "assistant" else m for m in asked]
        if isinstance(answer, str):
            return [*context, self._answer(values)]
        said = self._messages(row, answer, columns.completion)
        if not isinstance(said, list):
            raise ConversationError(
                f"{self._data.columns.completion!r} is {type(answer).__name__}, not a list of messages."
                " Give a text or a list"
            )
        return [*context, *said]

    def _question(self, values: Mapping[str, object]) -> object:
        more = values.get("input")
        if more is None or more == "":
            return values["prompt"]
        if not isinstance(more, str):
            raise ConversationError(f"{self._data.columns.input!r} is {type(more).__name__}, not text")
        return f"{values['prompt']}\n\n{more}"

    def _messages(self, row: Mapping[str, object], messages: object, name: str | None = "messages") -> object:
        """Give the messages their usual keys. `name` is the name of their list in error messages."""
        if isinstance(messages, str):  # cells of a CSV file are text
            column = self._data.columns.messages
            try:
                messages = parse_json(messages)
            except ValueError as error:
                raise ConversationError(
                    f"{column!r} is text, but not a list of messages in JSON ({describe_error(error)})"
                ) from error
        if not isinstance(messages, (list, tuple)):
            return messages
        named = self._data.columns.role
        wanted = {getattr(self._data.columns, name) for name in _MESSAGE_KEYS}
        for i, message in enumerate(messages):
            if isinstance(message, dict):
                self._keys |= {key: None for key in message if len(self._keys) < _MOST_NAMES or key in wanted}
                if named not in message:
                    self._unlike = self._unlike or row
                    raise ConversationError(f"{name}[{i}] has no {named!r} (it has: {', '.join(map(str, message))})")
        return [self._message(f"{name}[{i}]", message) for i, message in enumerate(messages)]

    def _message(self, where: str, message: object) -> object:
        """Give the message's keys their usual names. Other keys stay: `messages.parse_messages` knows them."""
        if not isinstance(message, dict):
            return message
        columns = self._data.columns
        replaced = {"role", "content", "thinking", columns.role, columns.content, columns.thinking}
        if columns.thinking != ColumnsConfig.thinking:  # the setting chooses the key with the reasoning
            replaced |= {*REASONING_KEYS}
        chat = {key: value for key, value in message.items() if key not in replaced}
        chat["role"] = self._role(where, message[columns.role])
        return {**chat, "content": message.get(columns.content), "thinking": message.get(columns.thinking)}

    def _role(self, where: str, name: object) -> object:
        role = self._data.roles.get(name, name) if isinstance(name, str) else name
        known = (*ROLES, *ROLE_ALIASES)
        meant = forms.role_of(role) if isinstance(role, str) and role not in known else None
        if meant is not None:
            raise ConversationError(
                f"{where} has the unknown role {role!r}; roles are {', '.join(ROLES)}. Set"
                f" '{self._key}.roles={{{name}: {meant}}}'"
            )
        return role


def _is_among(found: object, values: Sequence[object], row: Mapping[str, object]) -> bool:
    """Return whether a value of the row is one of `values`. A cell of a CSV or TSV file matches also as a number."""
    if found in values:
        return True
    return isinstance(row, TextRow) and isinstance(found, str) and any(_is_text_of(found, value) for value in values)


def _is_text_of(text: str, value: object) -> bool:
    """Return whether a text writes a number or a truth value: 1.50 for 1.5, True for true."""
    if not isinstance(value, int | float):
        return False
    if isinstance(value, bool) or text == str(value):
        return text.lower() == str(value).lower()
    try:
        return float(text) == value
    except ValueError:
        return False


def _drop_nulls(value: object) -> object:
    """Drop keys whose value is None. Arrow adds such keys: it gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_drop_nulls(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _has_null_arguments(messages: object) -> bool:
    """Return whether an argument of a tool call is null, in a list of messages."""
    calls = [call for item in _objects(messages) for call in _objects(item.get("tool_calls"))]
    functions = _objects([call.get("function") or call for call in calls])
    found = [function.get("arguments") for function in functions]
    return any(value is None for arguments in found if isinstance(arguments, dict) for value in arguments.values())


def _objects(values: object) -> list[dict[str, object]]:
    """Return the objects of a list. Other values have no objects."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, (list, tuple)) else []


def _has_instructions(messages: object) -> bool:
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and first.get("role") in ("system", "developer")


def _leaves(row: Mapping[str, object], prefix: str = "") -> list[str]:
    """Return the dotted paths of all columns, such as `meta.id`. Nested objects are expanded into their columns."""
    found: list[str] = []
    for name, value in row.items():
        found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return found
