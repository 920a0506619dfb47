"""The differences between the inputs of two builds are named, and equal contents at other places are none."""

from dataclasses import replace

from pipeline.runs.inputs import Inputs, list_differences

BEFORE = Inputs({"sft.epochs": 1, "data.path": "/a/rows.jsonl"}, {"upcast": "one"}, "rows")


def test_equal_inputs_have_no_differences() -> None:
    assert list_differences(BEFORE, Inputs.read({"version": 2, **BEFORE.plain()})) == []


def test_each_changed_setting_parent_and_data_set_is_named() -> None:
    now = Inputs({"sft.epochs": 2, "data.path": "/a/rows.jsonl"}, {"upcast": "two"}, "others")

    assert list_differences(BEFORE, now) == [
        "sft.epochs: was 1, is 2",
        "upcast: was 'one', is 'two'",
        "the data set's contents: fingerprint was rows, is others",
    ]


def test_the_same_data_at_another_place_is_no_difference() -> None:
    moved = replace(BEFORE, settings={**BEFORE.settings, "data.path": "/b/rows.jsonl"})

    assert list_differences(BEFORE, moved) == []
    assert list_differences(BEFORE, replace(moved, data="others")) != []
