"""The examples of docs/extending.md work: each adds a toy recipe, data set, scorer and so on, and runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pages import EXTENDING, Block, copy_checkout, read_sections, run_block


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the checkout."""
    return copy_checkout(tmp_path / "checkout")


@pytest.fixture
def extended(checkout: Path, smoke_run: Path) -> Path:
    """A copy of the checkout in which recipe=smoke has run."""
    shutil.copytree(smoke_run, checkout / "runs" / "smoke", symlinks=True)
    return checkout


def apply(block: Block, checkout: Path) -> None:
    """Write the file that a code block contains, or apply the block's diff to the file that it names."""
    first, _, rest = block.text.partition("\n")
    path = checkout / first.removeprefix("# ").strip()
    if block.language != "diff":
        path.write_text(block.text, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    place = -1
    for line in rest.splitlines():
        kind, text = line[:1], line[1:]
        if kind == "+":
            place += 1
            lines.insert(place, text)
        elif kind == "-":
            place = lines.index(text, place + 1)
            del lines[place]
            place -= 1
        else:
            place = lines.index(text, place + 1)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def follow(section: str, checkout: Path) -> str:
    """Follow a section of docs/extending.md, and return the output of its commands."""
    printed = ""
    for block in read_sections(EXTENDING)[section]:
        if block.language == "bash":
            printed += run_block(block, checkout)
        else:
            apply(block, checkout)
    return printed


def record(checkout: Path, stage: str) -> dict[str, Any]:
    return json.loads((checkout / "runs" / stage / "artifact.json").read_text(encoding="utf-8"))


def test_a_recipe_is_one_file(checkout: Path) -> None:
    follow("A recipe", checkout)
    assert record(checkout, "haiku/sft")["details"]["steps"] == 4
    assert record(checkout, "haiku/compare")["stage"] == "compare"


def test_a_data_set_is_one_file(checkout: Path) -> None:
    follow("A data set", checkout)
    assert record(checkout, "riddles/doctor")["details"]["data"]["rows"]["all"] == 20


def test_a_scorer_is_a_file_and_its_rows(extended: Path) -> None:
    assert '"brevity": ' in follow("A scorer", extended)
    assert record(extended, "smoke/evaluate")["details"]["results"]["export"]["brevity"] <= 1


def test_an_export_target_is_a_file_and_a_row(extended: Path) -> None:
    follow("An export target", extended)
    assert record(extended, "rowwise/export")["details"]["target"] == "rowwise"
    statuses = record(extended, "rowwise/verify")["details"]["checks"]
    assert [title for title, status in statuses.items() if title.startswith("experts") and status == "ok"]


def test_a_block_format_is_a_row_and_a_file(checkout: Path) -> None:
    follow("A block format", checkout)
    assert record(checkout, "nvfp4_32/qat")["fake_quantized"] == "nvfp4_32"
    assert record(checkout, "nvfp4_32/verify")["stage"] == "verify"


def test_an_engine_is_a_row(extended: Path) -> None:
    assert "lmdeploy serve api_server" in follow("An engine", extended)


def test_a_stage_is_a_file_and_its_rows(extended: Path) -> None:
    assert "[inventory] up to date" in follow("A stage", extended)
    assert record(extended, "smoke/inventory")["details"] == {"types": 2}
