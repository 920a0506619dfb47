"""Files of one line an answer, appended as it comes, so that an interrupted evaluation goes on."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pipeline.errors import UserError
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.artifacts import write_json
from pipeline.runs.console import say


class Answer(Protocol):
    """A dataclass, one line of a journal; what tells it from the others are the prompt and the sample."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def sample(self) -> int: ...


T = TypeVar("T", bound=Answer)


class Kind(NamedTuple):
    """A sort of journal: its file, the file of what decides the answers, and the class of an answer."""

    file: str
    inputs_file: str
    answer: type[Any]


GENERATIONS = Kind("generations.jsonl", "asked.json", Transcript)


class Journal(Generic[T]):
    """The answers that one model has given to one set of settings."""

    def __init__(self, directory: Path, inputs: dict[str, Any], kind: Kind = GENERATIONS) -> None:
        """Open it, or begin it anew if what was answered before was asked otherwise.

        Args:
            directory: of the model's answers; made if need be.
            inputs: all that decides an answer besides the prompt: the model and the settings, flat.
            kind: of the answers.

        Raises:
            UserError: a line is not an answer.
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
        """Keep answers; one that is there already stays as it is."""
        self._append([answer for answer in answers if _key(answer) not in self._answers])

    def replace(self, answer: T) -> None:
        """Keep an answer in place of one that is there; of its lines in the file, the last counts."""
        self._append([answer])

    def _append(self, answers: list[Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
        self._answers |= {_key(answer): answer for answer in answers}

    def _begin(self, path: Path, inputs: dict[str, Any]) -> None:
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before == inputs:
            return
        if self._path.is_file():
            changed = [name for name in sorted({*before, *inputs}) if before.get(name) != inputs.get(name)]
            told = "; ".join(f"{name} was {before.get(name)!r}, is {inputs.get(name)!r}" for name in changed)
            say("evaluate", f"{self._path}: begun anew, since {told}")
            self._path.unlink()
        write_json(path, inputs)

    def _read(self) -> list[T]:
        """All whole lines, as bytes: in text, U+2028 and others would end one too. One that was cut off is removed."""
        if not self._path.is_file():
            return []
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self._path.write_bytes(whole)
        try:
            return [self._class(**json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._path}: a line is not an answer of this program ({error}). Remove the file to ask again."
            ) from error


def _key(answer: Answer) -> tuple[str, int]:
    return answer.prompt_id, answer.sample
