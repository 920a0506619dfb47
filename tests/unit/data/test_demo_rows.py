"""The demonstration's data sets are written as .jsonl files, and read like files of the user."""

import json
from pathlib import Path

import pytest
from data_files import conversations, load_error

from pipeline.data.demo_rows import DATA_SETS, write

pytestmark = pytest.mark.usefixtures("working_directory")


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_are_read_from_a_file_in_the_run(name: str) -> None:
    found = conversations(f"synthetic://{name}", split="test")
    file = Path("run", "data", f"{name}-test.jsonl").absolute()
    assert found == conversations(file)
    assert found[2].where == f"{file}: row 3"
    assert len(found) == DATA_SETS[name].sizes["test"]


@pytest.mark.parametrize("name", DATA_SETS)
def test_the_same_rows_have_the_same_bytes(name: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = (write(directory, name, "validation") for directory in (tmp_path, tmp_path / "other"))
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_text(encoding="utf-8").splitlines()[0])["messages"]


def test_an_unknown_split_is_refused() -> None:
    assert load_error("synthetic://demo", split="dev") == (
        "data.split='dev': synthetic://demo has the splits train, validation, test."
    )
