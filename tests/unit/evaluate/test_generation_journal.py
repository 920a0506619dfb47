"""The file of answers: stored lines, reopening, and starting over."""

import json
from pathlib import Path

import pytest

from pipeline.data.conversations import Conversation
from pipeline.errors import UserError
from pipeline.evaluate.generation.journal import GENERATIONS, Journal
from pipeline.evaluate.generation.prompts import Prompt, Question
from pipeline.evaluate.transcripts import Transcript

INPUTS = {"model": "a", "temperature": 0.0}


def question(name: str, sample: int = 0) -> Question:
    return Question(Prompt(name, Conversation([{"role": "user", "content": name}]), {}), sample)


def answer(name: str, sample: int = 0, text: str = "ja, 5 \u2028 🙂") -> Transcript:
    return Transcript(name, sample, [], {"language": "German"}, None, text, None, "return", 3, None)


def test_added_answers_are_found_again(tmp_path: Path) -> None:
    Journal(tmp_path, INPUTS).add([answer("x"), answer("y", 1)])
    found = Journal(tmp_path, INPUTS)
    assert [found["y", 1], found["x", 0]] == [answer("y", 1), answer("x")]
    assert ("x", 0) in found and ("x", 1) not in found and ("z", 0) not in found


def test_every_answer_is_a_line_of_json_with_the_fields_of_a_transcript(tmp_path: Path) -> None:
    Journal(tmp_path, INPUTS).add([answer("x"), answer("y")])
    lines = (tmp_path / GENERATIONS.file).read_text(encoding="utf-8").split("\n")
    assert [Transcript(**json.loads(line)) for line in lines[:-1]] == [answer("x"), answer("y")]
    assert lines[-1] == ""


def test_a_stored_answer_is_not_replaced_by_add(tmp_path: Path) -> None:
    journal = Journal(tmp_path, INPUTS)
    journal.add([answer("x")])
    journal.add([answer("x", text="other"), answer("y")])
    assert Journal(tmp_path, INPUTS)["x", 0] == answer("x")
    assert len((tmp_path / GENERATIONS.file).read_text(encoding="utf-8").strip().split("\n")) == 2


def test_a_line_truncated_by_a_crash_is_asked_again(tmp_path: Path) -> None:
    Journal(tmp_path, INPUTS).add([answer("x"), answer("y")])
    whole = (tmp_path / GENERATIONS.file).read_bytes()
    (tmp_path / GENERATIONS.file).write_bytes(whole[:-10])
    journal = Journal(tmp_path, INPUTS)
    assert ("x", 0) in journal and ("y", 0) not in journal
    journal.add([answer("y")])
    assert (tmp_path / GENERATIONS.file).read_bytes() == whole


def test_other_settings_start_over_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path, INPUTS).add([answer("x")])
    assert ("x", 0) not in Journal(tmp_path, {**INPUTS, "temperature": 0.5})
    assert "all answers are generated again, because temperature changed from 0.0 to 0.5" in capsys.readouterr().out
    assert ("x", 0) not in Journal(tmp_path, INPUTS)


def test_an_invalid_line_is_an_error_with_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path, INPUTS)
    journal.add([answer("x")])
    with (tmp_path / GENERATIONS.file).open("a", encoding="utf-8") as file:
        file.write('{"prompt": 1}\n')
    with pytest.raises(UserError, match=rf"{GENERATIONS.file}: a line is not an answer of this program"):
        Journal(tmp_path, INPUTS)


def test_seeds_differ_between_prompts_samples_and_seeds() -> None:
    asked = [question("x"), question("x", 1), question("y")]
    seeds = [each.seed(42) for each in asked] + [question("x").seed(43)]
    assert len(set(seeds)) == 4
    assert question("x").seed(42) == seeds[0]
    assert all(0 <= seed < 2**31 for seed in seeds)
