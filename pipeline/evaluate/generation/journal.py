"""Store answers in a file, one per line.

Answers are appended as they arrive, so an interrupted evaluation can resume. Each line has a checksum, so a damaged
answer is found and made again.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.console import say, warn
from pipeline.runs.durable import cut_torn_line, replacing
from pipeline.runs.json_files import Json, read_record, seal, unseal, write_json


class Answer(Protocol):
    """A dataclass that is stored as one line of a journal. The prompt and the sample identify the answer."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def prompt_id(self) -> str: ...
    @property
    def sample(self) -> int: ...


T = TypeVar("T", bound=Answer)


class Kind(NamedTuple):
    """A kind of journal.

    Attributes:
        file: name of the file with the answers.
        inputs_file: name of the file with the model and the settings that the answers depend on.
        answer: class of an answer.
    """

    file: str
    inputs_file: str
    answer: type[Any]


GENERATIONS = Kind("generations.jsonl", "asked.json", Transcript)


class Journal(Generic[T]):
    """The answers of one model with one set of settings."""

    def __init__(self, directory: Path, inputs: Mapping[str, Json], kind: Kind = GENERATIONS) -> None:
        """Open the journal. If the stored answers were made from other inputs, delete them and start over.

        Args:
            directory: the directory of the model's answers; created if missing.
            inputs: the model and all settings that the answers depend on, as a flat mapping.
            kind: the kind of answers.
        """
        self._path = directory / kind.file
        self._class = kind.answer
        directory.mkdir(parents=True, exist_ok=True)
        self._begin(directory / kind.inputs_file, inputs)
        self._answers: dict[tuple[str, int], T] = {_key(answer): answer for answer in self._read()}

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._answers

    def __getitem__(self, key: tuple[str, int]) -> T:
        return self._answers[key]

    def add(self, answers: Iterable[T]) -> None:
        """Store answers. An answer to a question that already has an answer is skipped."""
        self._append([answer for answer in answers if _key(answer) not in self._answers])

    def replace(self, answer: T) -> None:
        """Store an answer in place of an earlier one.

        If the file has several answers to a question, the last counts.
        """
        self._append([answer])

    def _append(self, answers: list[T]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(seal(asdict(answer)), ensure_ascii=False) + "\n" for answer in answers)
        self._answers |= {_key(answer): answer for answer in answers}

    def _begin(self, path: Path, inputs: Mapping[str, Json]) -> None:
        before = self._read_inputs(path)
        if before == inputs:
            return
        if self._path.is_file():
            changed = [name for name in sorted({*before, *inputs}) if before.get(name) != inputs.get(name)]
            changes = "; ".join(f"{name} changed from {before.get(name)!r} to {inputs.get(name)!r}" for name in changed)
            say("evaluate", f"{self._path}: all answers are generated again, because {changes}")
            self._path.unlink()
        write_json(path, seal(inputs))

    @staticmethod
    def _read_inputs(path: Path) -> dict[str, Json]:
        try:
            return read_record(path) if path.is_file() else {}
        except ValueError as error:
            warn("evaluate", f"{path}: damaged ({error})")
            return {}

    def _read(self) -> list[T]:
        """Read all complete lines. Remove an incomplete last line and damaged lines from the file.

        Lines are split as bytes, because str.splitlines() also splits at U+2028 and other characters.
        """
        if not self._path.is_file():
            return []
        cut_torn_line(self._path)
        lines, answers, damaged = self._path.read_bytes().splitlines(keepends=True), [], []
        for number, line in enumerate(lines, 1):
            try:
                answers.append(read_answer(self._class, line))
            except (ValueError, TypeError) as error:
                damaged.append(number)
                warn("evaluate", f"{self._path}: line {number} is damaged and is made again ({error})")
        if damaged:
            kept = (line for number, line in enumerate(lines, 1) if number not in damaged)
            with replacing(self._path) as temporary:
                temporary.write_bytes(b"".join(kept))
        return answers


def read_answer(answer: type[T], line: bytes) -> T:
    """Read an answer from a line of a journal. Lines of older versions have no checksum.

    Raises:
        ValueError, TypeError: the line is not an answer, or differs from its checksum.
    """
    return answer(**unseal(json.loads(line)))


def _key(answer: Answer) -> tuple[str, int]:
    return answer.prompt_id, answer.sample
