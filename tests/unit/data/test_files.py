"""Data files: JSON and CSV are read like JSON lines, and files of another format are named with what to do."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_files import ROWS, conversations, jsonl, load_error, parquet

from pipeline.config import ColumnsConfig

PAIRS = ColumnsConfig(messages=None, prompt="prompt", completion="completion")

pytestmark = pytest.mark.usefixtures("working_directory")


def written(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    """Return (prompt, completion) of each row."""
    found = conversations(path, columns=PAIRS)
    return [(row.messages[0]["content"], row.messages[1]["content"]) for row in found]


# --- JSON ------------------------------------------------------------------------------------------------------------

BAD = {"messages": [{"role": "user", "content": "x"}]}


def test_a_bad_row_of_a_json_list_is_named_with_its_row_and_line() -> None:
    text = ",\n".join(json.dumps(row, indent=1) for row in (*ROWS[:2], BAD))
    path = written("rows.json", f"[\n{text}\n]")
    line = 1 + path.read_text()[: path.read_text().rindex("messages")].count("\n") - 1
    assert load_error(path) == f"rows.json: row 3 (line {line}): has no assistant message: there is nothing to learn."


def test_a_bad_row_of_a_json_list_on_one_line_is_named_with_its_row() -> None:
    path = written("rows.json", json.dumps([*ROWS[:2], BAD, 7]))
    assert load_error(path).splitlines()[1:] == [
        "  - rows.json: row 3: has no assistant message: there is nothing to learn.",
        "  - rows.json: row 4: is a int, not an object with 'messages'.",
    ]


def test_one_conversation_in_a_json_file_is_one_row() -> None:
    assert len(conversations(written("rows.json", json.dumps(ROWS[0], indent=2)))) == 1


def test_a_list_of_a_json_object_is_chosen_by_the_split() -> None:
    path = written("rows.json", json.dumps({"train": ROWS[:5], "test": ROWS[5:7]}))
    assert len(conversations(path)) == 5
    assert len(conversations(path, split="test")) == 2
    message = load_error(path, split="dev")
    assert message == "rows.json: holds the lists train, test, and none of them is the split 'dev'."


def test_a_list_of_another_split_in_a_json_object_is_not_read() -> None:
    path = written("rows.json", json.dumps({"test": ROWS}))
    assert load_error(path) == "rows.json: holds the list test, which is not the split 'train'."
    for name, split in (("training", "train"), ("test", "test"), ("data", "test"), ("chats", "train")):
        assert len(conversations(written("rows.json", json.dumps({name: ROWS})), split=split)) == len(ROWS)


PAIR = {"prompt": "a", "completion": "b"}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def test_tools_in_a_json_object_with_text_belong_to_its_row() -> None:
    (row,) = conversations(written("rows.json", json.dumps({**PAIR, "tools": [FUNCTION]})), columns=PAIRS)
    assert row.tools == [FUNCTION]


def test_another_list_in_a_json_object_with_text_is_refused() -> None:
    message = load_error(written("rows.json", json.dumps({**PAIR, "sources": [{"url": "c"}]})), columns=PAIRS)
    assert message.startswith("rows.json: holds one object with text and the list sources. If the list holds the rows,")
    assert pairs(written("rows.json", json.dumps([{**PAIR, "sources": [{"url": "c"}]}]))) == [("a", "b")]
    assert pairs(written("rows.json", json.dumps({"version": "v2", "data": [PAIR]}))) == [("a", "b")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"a": 1}, {"a": }]', "Expecting value: line 1 column 18"),
        ('[{"a": 1}\n {"a": 2}]', "Expecting ',' or ']': line 2 column 2"),
        ('[{"a": 1}', "Expecting ',' or ']': line 1 column 10"),
        ('[{"a": 1}] x', "Extra data: line 1 column 12"),
        ('{"a": 1} x', "Expecting value: line 1 column 10"),
    ],
)
def test_a_json_file_that_is_not_valid_is_named_with_the_place(text: str | bytes, reason: str) -> None:
    message = load_error(written("rows.json", text))
    assert message.startswith("rows.json: not valid JSON (") and reason in message


@pytest.mark.parametrize("text", ["", " \n", "[]", "[ ]\n"])
def test_an_empty_json_file_is_an_empty_data_set(text: str) -> None:
    assert load_error(written("rows.json", text)) == "data.path=rows.json: the data set is empty."


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", 'prompt,completion\n"A, ""b""\nc",007\nx,1.50\n'),
        ("rows.CSV", '\ufeffprompt,completion\r\n"A, ""b""\nc",007\r\nx,1.50\r\n'),
        ("rows.tsv", 'prompt\tcompletion\n"A, ""b""\nc"\t007\nx\t1.50\n'),
    ],
)
def test_cells_are_text_as_it_stands_in_the_file(name: str, text: str) -> None:
    assert pairs(written(name, text)) == [('A, "b"\nc', "007"), ("x", "1.50")]


def test_rows_of_a_csv_file_with_too_many_or_too_few_cells_are_named() -> None:
    path = written("rows.csv", "prompt,completion\na,b\nonly\nc,d\n1,2,3\n,e\n")
    assert load_error(path, columns=PAIRS).splitlines()[1:] == [
        "  - rows.csv: 2 rows (2 (line 3) and 4 (line 5)) have similar problems. The first: has 1 cells, but the header"
        " has 2. Put quotes around cells that contain commas or line breaks.",
        "  - rows.csv: row 5 (line 6): has nothing in 'prompt'.",
    ]


def test_a_row_that_is_broken_at_the_end_of_a_csv_file_is_named() -> None:
    assert load_error(written("rows.csv", "prompt,completion\na,b\nc\n"), columns=PAIRS).startswith(
        "rows.csv: row 2 (line 3): has 1 cells"
    )


def test_a_broken_row_of_a_csv_file_is_named_with_its_line_after_cells_of_several_lines() -> None:
    path = written("rows.csv", 'prompt,completion\n"a\nb",c\n\n"d\n\ne",f\nonly\n')
    assert load_error(path, columns=PAIRS).startswith("rows.csv: row 3 (line 8): has 1 cells")


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        (
            "rows.csv",
            'prompt,completion\na,b\nc,"d\ne,f\n',
            "line 3 has a wrong quote (unexpected end of data, line 4)",
        ),
        ("rows.csv", 'prompt,completion\n"a,b\n"c",d\n', "line 2 has a wrong quote (',' expected after '\"', line 3)"),
        ("rows.tsv", 'prompt\tcompletion\n"a" b\tc\n', "line 2 has a wrong quote ("),
    ],
)
def test_a_quote_that_is_not_closed_or_not_doubled_is_refused(name: str, text: str, place: str) -> None:
    message = load_error(written(name, text), columns=PAIRS)
    assert message.startswith(f"{name}: the row that begins in {place}") and "double each quote" in message


@pytest.mark.parametrize(
    ("cell", "wanted", "is_kept"),
    [
        ("1", 1, True),
        ("1.50", 1.5, True),
        ("True", True, True),
        ("12345678901234567891", 12345678901234567891, True),
        ("a", "a", True),
        ("", None, True),
        ("1", True, False),
        ("10", 1, False),
        ("one", 1, False),
        ("1.50", "1.5", False),
    ],
)
def test_a_filter_matches_cells_that_are_numbers(cell: str, wanted: object, is_kept: bool) -> None:
    path = written("rows.csv", f"prompt,completion,label\na,b,other\nc,d,{cell}\n")
    found = conversations(path, columns=PAIRS, filter={"label": [wanted, "other"]})
    assert len(found) == 1 + is_kept


def test_a_filter_does_not_take_the_text_of_a_json_row_for_a_number() -> None:
    path = jsonl(Path("rows.jsonl"), [{**ROWS[0], "label": "1"}, {**ROWS[1], "label": 1}])
    assert len(conversations(path, filter={"label": [1]})) == 1


def test_a_cell_may_be_long() -> None:
    long = "x" * (1 << 18)
    assert pairs(written("rows.csv", f"prompt,completion\na,{long}\n")) == [("a", long)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prompt;completion\na;b\n", "are separated by commas, not by semicolons."),
        ("prompt\tcompletion\na\tb\n", "are separated by commas, not by tabs."),
        ("prompt,prompt\na,b\n", "the header has the column 'prompt' twice."),
        (b"prompt,completion\n\xff,b\n", "not in UTF-8"),
    ],
)
def test_a_csv_file_of_another_form_is_refused(text: str | bytes, reason: str) -> None:
    message = load_error(written("rows.csv", text), columns=PAIRS)
    assert message.startswith("rows.csv: ") and reason in message


@pytest.mark.parametrize("text", ["", "\n", "prompt,completion\n"])
def test_a_csv_file_without_rows_is_an_empty_data_set(text: str) -> None:
    assert load_error(written("rows.csv", text), columns=PAIRS) == "data.path=rows.csv: the data set is empty."


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_utf_16_is_named_with_the_command_that_converts_it(name: str, encoding: str) -> None:
    text = "messages\n" if name == "rows.csv" else jsonl(Path("x"), ROWS[:1]).read_text()
    message = load_error(written(name, text.encode(encoding)))
    named = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    command = f"iconv -f {named} -t UTF-8 {name} > utf8-{name}"
    assert message == f"data.path={name}: is in {named}, not in UTF-8. Convert it: {command}"
    subprocess.run(command, shell=True, check=True)
    assert Path(f"utf8-{name}").read_text(encoding="utf-8").endswith(text)


@pytest.mark.parametrize(("name", "place"), [("rows.jsonl", "rows.jsonl: row 1"), ("rows.json", "rows.json")])
def test_a_file_in_latin_1_is_named_with_the_command_that_converts_it(name: str, place: str) -> None:
    message = load_error(written(name, '{"messages": "é"}'.encode("latin-1")))
    assert message.startswith(f"{place}: not in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 14")
    assert message.endswith(f"convert it (iconv -f LATIN1 -t UTF-8 {name} > utf8-{name}).")


def test_messages_that_are_not_json_are_refused() -> None:
    message = load_error(written("rows.csv", "messages\n\"[{'role': 'user'}]\"\n"))
    assert message.startswith("rows.csv: row 1 (line 2): 'messages' is text, but not a list of messages in JSON (")


# --- other formats ---------------------------------------------------------------------------------------------------


def test_parquet_with_another_name_is_refused_with_the_command_that_renames_it() -> None:
    parquet(Path("rows.parquet"), ROWS)
    for name in ("rows.pq", "rows.data", "rows.jsonl", "my rows.csv"):
        shutil.copy("rows.parquet", name)
        message = load_error(name)
        assert message.startswith(f"data.path={name}: holds Parquet. Rename it: mv ")
        assert message.endswith(".parquet" if " " not in name else "'my rows.parquet'")


@pytest.mark.parametrize(
    ("name", "target"),
    [("rows.jsonl.gz", "rows.jsonl"), ("rows.jsonl", "unpacked-rows.jsonl"), ("rows", "unpacked-rows")],
)
def test_a_compressed_file_is_refused_with_the_command_that_unpacks_it(name: str, target: str) -> None:
    written(name, gzip.compress(b"{}"))
    message = load_error(Path(name).absolute())
    unpack = f"gzip -dc {Path(name).absolute()} > {Path(target).absolute()}"
    assert message.endswith(f": is compressed with gzip. Unpack it: {unpack}")


def test_an_advised_command_does_not_overwrite_a_file() -> None:
    for name in ("rows.json", "rows-2.json", "packed.jsonl", "table.parquet"):
        written(name, "[]")
    parquet(Path("table.csv"), ROWS)
    assert load_error(written("rows.jsonl", "[{}]")).endswith("Rename it: mv rows.jsonl rows-3.json")
    assert load_error(written("packed.jsonl.gz", gzip.compress(b"{}"))).endswith("packed.jsonl.gz > packed-2.jsonl")
    assert load_error("table.csv").endswith("Rename it: mv table.csv table-2.parquet")


@pytest.mark.parametrize("text", [json.dumps(ROWS, indent=1), json.dumps(ROWS), json.dumps(ROWS[0], indent=1)])
def test_json_named_as_json_lines_is_refused_with_the_command_that_renames_it(text: str) -> None:
    message = load_error(written("rows.jsonl", text))
    assert message.endswith(", not one object on each line. Rename it: mv rows.jsonl rows.json")
    Path("rows.jsonl").rename("rows.json")
    assert conversations("rows.json")


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("rows.ndjson", b"{}", "must be named *.jsonl. Rename it: mv rows.ndjson rows.jsonl"),
        ("rows.xlsx", b"PK\x03\x04", "is an Excel file. Save it as CSV (UTF-8) in Excel"),
        ("rows.zip", b"PK\x03\x04", "is a zip archive. Unpack it"),
        ("rows.arrow", b"\xff\xff", "is an Arrow file. Give the folder of the saved data set"),
    ],
)
def test_other_formats_are_named(name: str, content: bytes, advice: str) -> None:
    assert load_error(written(name, content)).startswith(f"data.path={name}: {advice}")


def test_a_file_of_another_format_in_a_folder_is_named() -> None:
    folder = Path("data")
    folder.mkdir()
    jsonl(folder / "a.jsonl", ROWS)
    written("data/b.jsonl", json.dumps(ROWS))
    assert load_error(folder).startswith("data.path=data/b.jsonl: holds one JSON list")


def test_a_parquet_file_without_rows_of_objects_is_read_by_columns() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"]}), "rows.parquet")
    assert pairs(Path("rows.parquet")) == [("a", "b")]
