"""generations.jsonl: every answer of one model, appended as it comes, so that an interrupted evaluation goes on."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.errors import UserError
from pipeline.generation.prompts import Question
from pipeline.tracking import say
from pipeline.transcripts import Transcript

FILE = "generations.jsonl"
_INPUTS = "asked.json"


class Journal:
    """The answers that one model has given to one set of settings."""

    def __init__(self, directory: Path, inputs: dict[str, Any]) -> None:
        """Open it, or begin it anew if what was answered before was asked otherwise.

        Args:
            directory: of the model's answers; made if need be.
            inputs: all that decides an answer besides the prompt: the model and the settings, flat.

        Raises:
            UserError: a line is not an answer.
        """
        self._path = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        self._begin(directory / _INPUTS, inputs)
        self._answers = {(answer.prompt_id, answer.sample): answer for answer in self._read()}

    def __contains__(self, question: Question) -> bool:
        return question.key in self._answers

    def add(self, answers: Iterable[Transcript]) -> None:
        """Keep answers; one that is there already stays as it is."""
        new = [answer for answer in answers if (answer.prompt_id, answer.sample) not in self._answers]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in new)
        self._answers |= {(answer.prompt_id, answer.sample): answer for answer in new}

    def transcripts(self, questions: list[Question]) -> list[Transcript]:
        """The answers to these questions, all of which have been answered, in order."""
        return [self._answers[question.key] for question in questions]

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

    def _read(self) -> list[Transcript]:
        """All whole lines, as bytes: in text, U+2028 and others would end one too. One that was cut off is removed."""
        if not self._path.is_file():
            return []
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            self._path.write_bytes(whole)
        try:
            return [Transcript(**json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{self._path}: a line is not an answer of this program ({error}). Remove the file to ask again."
            ) from error
