"""Training ends with an error at the first step whose loss is not finite."""

from pathlib import Path

import pytest
from conftest import SHORT, linked, run_program

from pipeline.runs.metrics import read_metrics


@pytest.mark.parametrize("accumulated", [1, 3])
def test_training_ends_at_the_step_that_diverges(
    accumulated: int, smoke_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linked(tmp_path, smoke_run, "upcast")
    # The first step of the warm-up has a rate of 0, so it changes nothing. The second step makes the weights overflow.
    settings = ("sft.learning_rate=1e30", f"sft.gradient_accumulation_steps={accumulated}", "sft.batch_size=2")
    assert run_program("stage=sft", "recipe=smoke", f"run_dir={tmp_path}", *SHORT, *settings) == 2
    message = "sft.learning_rate=1e+30: training diverged (the loss of step 3 is not finite). Lower it."
    assert message in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "sft")] == [0, 2]
    assert not (tmp_path / "sft" / "artifact.json").exists()
