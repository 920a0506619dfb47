"""Each line of metrics.jsonl gives one key for each figure of each model."""

import pytest

from pipeline.runs.trackers.readings import read_line, split


@pytest.mark.parametrize(
    ("stage", "line", "step", "numbers"),
    [
        ("sft", {"step": 3, "eval_loss": 0.5, "grad_norm": None}, 3, {"sft/eval_loss": 0.5}),
        ("evaluate", {"model": "qat", "validation_loss": 2}, None, {"qat/validation_loss": 2.0}),
        ("evaluate", {"model": "controls/a/sft", "x": 1}, None, {"controls/a/sft/x": 1.0}),
        ("export", {"layer": 7, "survival": 0.1}, 7, {"export/layers/survival": 0.1}),
        ("export", {"survival": 0.2}, None, {"export/survival": 0.2}),
        ("quantize", {"candidate": 1, "kl_divergence": 3}, 1, {"quantize/candidates/kl_divergence": 3.0}),
        ("doctor", {"section": "rows", "counts": {"a b": 1}}, None, {"doctor/rows/counts/a_b": 1.0}),
        ("verify", {"check": "names, a/b", "is_equal": True}, None, {"verify/names__a_b/is_equal": 1.0}),
    ],
)
def test_keys_begin_with_the_model_or_the_stage(
    stage: str, line: dict[str, object], step: int | None, numbers: dict[str, float]
) -> None:
    reading = read_line({"time": 1.5, **line}, stage)
    assert (reading.time, reading.step, reading.numbers, reading.texts) == (1.5, step, numbers, {})


def test_the_caller_can_name_a_model_that_several_runs_have() -> None:
    reading = read_line({"time": 1.0, "model": "qat", "x": 1}, "compare", "first/qat")
    assert reading.numbers == {"first/qat/x": 1.0}


def test_texts_and_lists_are_texts() -> None:
    assert split({"status": "passed", "first": [1, "a"], "long": "x" * 9000}, "verify") == (
        {},
        {"verify/status": "passed", "verify/first": '[1, "a"]', "verify/long": "x" * 4000},
    )
