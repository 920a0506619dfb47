"""Targets for fuzzing: each feeds bytes to a parser. The only errors that a parser may raise are UserErrors.

The bytes choose a document among valid ones, and edits of it. A fuzzer that keeps inputs with new coverage can so build
on them. `scripts/fuzz` runs the targets with atheris, and tests/integration/test_fuzzing.py runs them with hypothesis.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.checkpoints.gpt_oss import Shape
from pipeline.checkpoints.reading import TensorFiles
from pipeline.checkpoints.recognition import raise_if_other_layout
from pipeline.config import DataConfig, Sharding, TinyConfig, command_line
from pipeline.config.composition import FOLDERS
from pipeline.data import harmony_text
from pipeline.data.columns import Columns
from pipeline.data.conversations import Conversation, ConversationError
from pipeline.data.files import raise_if_other_format, read_file
from pipeline.data.json_rows import Unreadable
from pipeline.data.parsing import parse_conversation
from pipeline.errors import UserError
from pipeline.evaluate.transcripts import parse
from pipeline.models import tiny_model
from pipeline.runs.artifacts import SAMPLES_FILE, load
from pipeline.runs.foreign_files import read_json
from pipeline.runs.metrics import METRICS_FILE
from pipeline.training.resume import find_last_complete, mark_complete, restore_records

Target = Callable[[bytes], None]

_TEXTS = (
    "",
    "a",
    "x" * 300,
    "\ud800",
    "\0",
    "<|end|>",
    "user",
    "assistant",
    "functions.f",
    "1e999",
    "../x",
    "[]",
    "{}",
)
_NUMBERS = (0, 1, -1, 2, 1.5, 1 << 31, 1 << 63, 10**30, float("nan"), float("inf"), True, False)
_KEYS = (
    *("role", "content", "thinking", "tool_calls", "function", "name", "arguments", "tools", "weight", "channel"),
    *("messages", "type", "text", "parameters", "properties", "oneOf", "enum", "items", "required", "description"),
    *("dtype", "shape", "data_offsets", "weight_map", "factor", "rope_type", "files", "settings", "kind", "default"),
)
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": ["string", "null"], "enum": ["x"], "default": "x", "description": "d"},
        "b": {"oneOf": [{"type": "integer", "default": 1}, {"type": "array", "items": {"type": "object"}}]},
    },
    "required": ["a"],
}
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "thinking": "t"}]},
    {
        "messages": [
            {"role": "system", "content": "reasoning language: French"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [_CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "ho", "weight": 0},
            {"role": "user", "content": "go on"},
            {"role": "assistant", "channel": "analysis", "content": "a"},
            {"role": "assistant", "channel": "final", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": _SCHEMA}}],
        "reasoning_effort": "low",
    },
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "function_call": {"name": "f"}}]},
    {"prompt": "hi", "completion": "ho", "meta": {"id": 1}},
    {"conversations": [{"from": "human", "value": "x"}]},
)


class Choices:
    """Decisions that bytes make. Without bytes left, each decision is the first."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def number(self, below: int) -> int:
        return next(self._data, 0) % below

    def one_of(self, values: Any) -> Any:
        return values[self.number(len(values))]

    def rest(self) -> bytes:
        return bytes(self._data)


def edited(documents: Any, choices: Choices) -> Any:
    """Choose a document, and replace, add, repeat or remove values at chosen places."""
    document = json.loads(json.dumps(choices.one_of(documents)))
    for _ in range(1 + choices.number(4)):
        document = _edit(document, choices)
    return document


def _edit(value: Any, choices: Choices) -> Any:
    if isinstance(value, (dict, list)) and value and choices.number(5):
        places = list(value) if isinstance(value, dict) else range(len(value))
        place = choices.one_of(places)
        kind = choices.number(8)
        if kind == 0:
            del value[place]
        elif kind == 1 and isinstance(value, dict):
            value[choices.one_of(_KEYS)] = _any_value(choices)
        elif kind == 1:
            value.append(value[place])
        else:
            value[place] = _edit(value[place], choices)
        return value
    return _any_value(choices)


def _any_value(choices: Choices) -> Any:
    kind = choices.number(8)
    if kind == 0:
        return choices.one_of(_TEXTS)
    if kind == 1:
        return choices.one_of(_NUMBERS)
    if kind == 2:
        return None
    if kind == 3:
        return [_any_value(choices) for _ in range(choices.number(3))]
    if kind == 4:
        return {choices.one_of(_KEYS): _any_value(choices) for _ in range(choices.number(3))}
    if kind == 5:
        return [[[_any_value(choices)]]]
    return choices.rest().decode("utf-8", "replace")


def _dumped(document: Any) -> str:
    """Return a document as JSON. Python's own encoder fails on a value that is nested deeper than its stack."""
    try:
        return json.dumps(document)
    except RecursionError:
        return "[" * 100_000


def _text(documents: Any, choices: Choices) -> bytes:
    """Return a document with edits as JSON, in which bytes may be replaced or cut off."""
    text = bytearray(_dumped(edited(documents, choices)).encode("utf-8", "surrogatepass"))
    for _ in range(choices.number(3)):
        text[choices.number(256) * 7 % len(text)] = choices.number(256)
    return bytes(text[: len(text) * choices.number(8) // 7] if choices.number(10) == 9 else text)


def targets(directory: Path) -> dict[str, Target]:
    """Make all targets. Files are written to `directory`, which should be in memory."""
    files = _Files(directory)
    made = {
        *(fuzz_rows, fuzz_conversations, fuzz_overrides, fuzz_completions),
        *(files.fuzz_row_files, files.fuzz_config, files.fuzz_header, files.fuzz_index),
        *(files.fuzz_adapter_config, files.fuzz_artifact, files.fuzz_parquet, files.fuzz_resume),
    }
    return {target.__name__.removeprefix("fuzz_"): target for target in sorted(made, key=lambda each: each.__name__)}


def fuzz_rows(data: bytes) -> None:
    """A row of a data set, with any of the usual columns."""
    choices = Choices(data)
    settings = choices.one_of(_COLUMNS)
    columns = Columns("data", settings)
    try:
        row = columns.require_object(edited(ROWS, choices))
        chat_row = columns.to_chat_row(row)
        if chat_row is not None:
            _render(parse_conversation(chat_row, "row 1"))
    except ConversationError as error:
        str(error).encode("utf-8", "backslashreplace")
    columns.list_missing()


def fuzz_conversations(data: bytes) -> None:
    """A row in chat form. It is rendered as Harmony text."""
    choices = Choices(data)
    try:
        _render(parse_conversation(edited(ROWS[:3], choices), "row 1", needs_answer=bool(choices.number(2))))
    except ConversationError as error:
        str(error).encode("utf-8", "backslashreplace")


def _render(conversation: Conversation) -> None:
    json.dumps([conversation.messages, conversation.tools], allow_nan=False, ensure_ascii=False).encode()
    for text in harmony_text.write_script(conversation, "low", "2025-08-05", None, True).texts():
        text.encode()
    harmony_text.write_prompt(conversation, "low", "2025-08-05", None).encode()


def fuzz_overrides(data: bytes) -> None:
    """An argument of the command line."""
    choices = Choices(data)
    key = choices.one_of(
        ("sft.learning_rate", "data.path", "data.blend", "+a", "~data", "data.filter", "sft.lora.layers")
    )
    text = choices.rest().decode("utf-8", "replace")
    command_line.problems([f"{key}={text}"], FOLDERS)
    command_line.problems([text], FOLDERS)


def fuzz_completions(data: bytes) -> None:
    """Text that a model generated."""
    choices = Choices(data)
    parts = (
        "<|channel|>",
        "analysis",
        "final",
        "<|message|>",
        "<|end|>",
        "<|start|>",
        " to=functions.f",
        "<|call|>",
        "x",
    )
    text = "".join(choices.one_of(parts) for _ in range(choices.number(40)))
    parse(text + choices.rest().decode("utf-8", "replace"))


class _Files:
    """Targets that read files. Each writes one damaged file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._model = directory / "model"
        tiny_model.create_tiny(self._model, TinyConfig(num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1))
        self._config = json.loads((self._model / "config.json").read_text(encoding="utf-8"))
        self._index_path = self._model / "model.safetensors.index.json"
        self._index = json.loads(self._index_path.read_text(encoding="utf-8"))
        shard = min(self._model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        content = shard.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        self._header, self._body = json.loads(content[8 : 8 + length]), content[8 + length :]
        self._shards = directory / "shards"
        self._shards.mkdir()

    def fuzz_row_files(self, data: bytes) -> None:
        """A file of rows: the first byte chooses its format."""
        choices = Choices(data)
        path = self._directory / f"rows{choices.one_of(('.jsonl', '.json', '.csv', '.tsv'))}"
        kind = choices.number(3)
        path.write_bytes(_text([*ROWS, list(ROWS), {"train": list(ROWS)}], choices) if kind else choices.rest())
        raise_if_other_format("data", path)
        for _, row in read_file(path, "train"):
            assert isinstance(row, Unreadable) or json.dumps(row)

    def fuzz_config(self, data: bytes) -> None:
        """config.json."""
        path = self._write("config.json", _text([self._config], Choices(data)))
        config = read_json(path)
        if isinstance(config, dict):
            Shape.of(config, path)

    def fuzz_header(self, data: bytes) -> None:
        """The header of a safetensors file."""
        choices = Choices(data)
        header = _text([self._header], choices)
        length = choices.one_of((len(header), len(header) + 1, 1 << 63, 0, len(header) + len(self._body)))
        path = self._shards / "model.safetensors"
        path.write_bytes(struct.pack("<Q", length if choices.number(4) == 0 else len(header)) + header + self._body)
        files = TensorFiles(self._shards)
        for name, info in files.tensors.items():
            if info.dtype == "BF16":
                files.read(name)
        files.close()

    def fuzz_index(self, data: bytes) -> None:
        """The index of the shards."""
        self._index_path.write_bytes(_text([self._index], Choices(data)))
        TensorFiles(self._model).close()

    def fuzz_adapter_config(self, data: bytes) -> None:
        """adapter_config.json of a directory that is given as a model."""
        document = {"base_model_name_or_path": "a/b", "peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
        raise_if_other_layout(self._write("adapter_config.json", _text([document], Choices(data))).parent)

    def fuzz_artifact(self, data: bytes) -> None:
        """artifact.json."""
        load(self._write("artifact.json", _text([ARTIFACT], Choices(data))).parent)

    def fuzz_parquet(self, data: bytes) -> None:
        """A Parquet file with bytes replaced."""
        choices = Choices(data)
        content = bytearray(self._parquet())
        for _ in range(1 + choices.number(16)):
            content[(choices.number(256) * 256 + choices.number(256)) % len(content)] = choices.number(256)
        path = self._directory / "rows.parquet"
        path.write_bytes(content)
        for _, row in read_file(path, "train"):
            assert isinstance(row, dict)

    def fuzz_resume(self, data: bytes) -> None:
        """The files that interrupted training resumes from. One of them is damaged, so its copy or digest finds it."""
        choices, stage = Choices(data), self._directory / "stage"
        shutil.rmtree(stage, ignore_errors=True)
        checkpoint = stage / "checkpoints" / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps(_STATE))
        for name in (METRICS_FILE, SAMPLES_FILE):
            (stage / name).write_text(_LINES)
        mark_complete(checkpoint, Sharding.none)
        path = choices.one_of((stage / METRICS_FILE, stage / SAMPLES_FILE, *sorted(checkpoint.iterdir())))
        path.write_bytes(choices.one_of((_text([_STATE], choices), choices.rest(), path.read_bytes() + b"[\n")))
        found = find_last_complete(checkpoint.parent, "sft", Sharding.none)
        restore_records(stage, "sft", found)
        assert (stage / METRICS_FILE).exists() == (found is not None)
        assert found is None or (stage / METRICS_FILE).read_text() == (stage / SAMPLES_FILE).read_text() == _LINES

    def _parquet(self) -> bytes:
        path = self._directory / "whole.parquet"
        if not path.exists():
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"messages": [ROWS[0]["messages"]] * 20}), path)
        return path.read_bytes()

    def _write(self, name: str, content: bytes) -> Path:
        directory = self._directory / name.partition(".")[0]
        directory.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
        return directory / name


_STATE = {"best_global_step": 1, "log_history": [{"step": 0, "eval_loss": 2.0}, {"step": 1, "eval_loss": 1.0}]}
_LINES = "".join(json.dumps(line) + "\n" for line in ({"step": 0, "eval_loss": 2.0}, {"step": 1, "eval_loss": 1.0}))
ARTIFACT = {
    "stage": "sft",
    "kind": "checkpoint",
    "format": "bf16",
    "fake_quantized": None,
    "scale_rule": None,
    "fingerprint": "0",
    "parents": {"upcast": "0"},
    "settings": {"model.path": "x"},
    "files": {"config.json": 3},
    "details": {},
    "base_model": {},
    "data": None,
}


def _columns() -> Iterator[DataConfig]:
    yield DataConfig(path="rows.jsonl")
    yield DataConfig(path="rows.jsonl", filter={"meta.id": [1]})


_COLUMNS = list(_columns())


def run(target: Target, data: bytes) -> None:
    """Run a target. A UserError is a right answer to a damaged input, any other exception is a finding."""
    try:
        target(data)
    except UserError as error:
        assert str(error)
