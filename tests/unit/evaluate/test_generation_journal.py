"""The file of answers: stored lines, reopening, and starting over."""

import json
from pathlib import Path

import pytest

from pipeline.data.conversations import Conversation
from pipeline.evaluate.generation.journal import GENERATIONS, Journal, read_answer
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


def test_every_answer_is_a_line_of_json_with_the_fields_of_a_transcript_and_a_checksum(tmp_path: Path) -> None:
    Journal(tmp_path, INPUTS).add([answer("x"), answer("y")])
    lines = (tmp_path / GENERATIONS.file).read_text(encoding="utf-8").split("\n")
    stored = [json.loads(line) for line in lines[:-1]]
    assert all(len(each.pop("checksum")) == 32 for each in stored)
    assert [Transcript(**each) for each in stored] == [answer("x"), answer("y")]
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


def test_a_damaged_line_is_named_and_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path, INPUTS).add([answer("x"), answer("y"), answer("z")])
    path = tmp_path / GENERATIONS.file
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b", 5 ", b", 7 ") + b'{"prompt": 1}\n' + lines[2])
    journal = Journal(tmp_path, INPUTS)
    assert ("x", 0) in journal and ("y", 0) not in journal and ("z", 0) in journal
    told = capsys.readouterr().err
    assert f"{path}: line 2 is damaged" in told and f"{path}: line 3 is damaged" in told
    assert path.read_bytes() == lines[0] + lines[2]


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_any_byte_of_an_answer_is_found(bit: int, tmp_path: Path) -> None:
    Journal(tmp_path, INPUTS).add([answer("x", text="ja")])
    good = (tmp_path / GENERATIONS.file).read_bytes().rstrip()
    for at in range(len(good)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << bit
        try:
            assert read_answer(Transcript, bytes(damaged)) == answer("x", text="ja")
        except (ValueError, TypeError):
            continue
        assert at > good.index(b"checksum") - 10 or json.loads(damaged) == json.loads(good)


def test_lines_of_older_versions_have_no_checksum_and_are_kept(tmp_path: Path) -> None:
    Journal(tmp_path, INPUTS).add([answer("x")])
    path = tmp_path / GENERATIONS.file
    line = json.loads(path.read_text(encoding="utf-8"))
    del line["checksum"]
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    assert Journal(tmp_path, INPUTS)["x", 0] == answer("x")


def test_damaged_inputs_are_named_and_everything_is_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Journal(tmp_path, INPUTS).add([answer("x")])
    path = tmp_path / GENERATIONS.inputs_file
    path.write_text(path.read_text().replace('"model": "a"', '"model": "b"'))
    assert ("x", 0) not in Journal(tmp_path, INPUTS)
    assert f"{path}: damaged" in capsys.readouterr().err


def test_seeds_differ_between_prompts_samples_and_seeds() -> None:
    asked = [question("x"), question("x", 1), question("y")]
    seeds = [each.seed(42) for each in asked] + [question("x").seed(43)]
    assert len(set(seeds)) == 4
    assert question("x").seed(42) == seeds[0]
    assert all(0 <= seed < 2**31 for seed in seeds)
