"""A control's directory: its links to the main run, and how stale models are found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluated
import pytest

from pipeline.config import ModelConfig, PipelineConfig, RoundingMethod, Stage
from pipeline.config.controls import Control
from pipeline.errors import UserError
from pipeline.models import references
from pipeline.runs import controls
from pipeline.runs.json_files import write_json
from pipeline.runs.run import Run


@pytest.fixture
def main(tmp_path: Path) -> Run:
    run = Run(PipelineConfig(Stage.controls, run_dir=str(tmp_path / "run"), model=ModelConfig("gpt")))
    for name in ("upcast", "sft", "data"):
        run.stage_dir(name).mkdir(parents=True)
    return run


def parts_of(main: Run) -> Control:
    config = replace(main.config, run_dir=f"{main.directory}/controls/bf16_parts")
    return Control("bf16_parts", config, (Stage.upcast, Stage.sft), "its origin")


def test_a_link_is_removed_if_the_control_makes_the_stage_itself(main: Run) -> None:
    control, directory = parts_of(main), main.directory / "controls" / "bf16_parts"
    controls.prepare(main, control, [Stage.sft])
    assert (directory / "upcast").resolve() == main.directory.resolve() / "upcast"
    controls.prepare(main, control, [Stage.upcast, Stage.sft])
    assert not (directory / "upcast").exists() and (main.directory / "upcast").is_dir()
    assert (directory / "data").is_symlink()


def stale(main: Run) -> str:
    """Return the advice for the only control of a run, which is stale."""
    (made,) = controls.find_made(main)
    return controls.remedy(made)


def stochastic(main: Run, **facts: Any) -> str | None:
    """Make PTQ by stochastic rounding, and return the reason why it is stale."""
    directory = main.directory / "controls" / "stochastic"
    evaluated.record(directory / "quantize", parents={"sft": "sft"}, **facts)
    write_json(directory / "control.json", {"stage": "quantize"})
    (made,) = controls.find_made(main)
    return made.staleness


def test_a_control_with_other_settings_than_the_main_run_gives_it_is_stale(main: Run) -> None:
    same = {"quantize.method": "stochastic", "quantize.seed": 42, "data.path": "others.jsonl"}
    assert stochastic(main, settings=same) is None
    reason = "it was made with other settings: quantize.seed: was 7, is 42"
    assert stochastic(main, settings={**same, "quantize.seed": 7}) == reason


def test_a_control_that_the_settings_do_not_ask_for_is_stale(main: Run) -> None:
    own = replace(main.config, quantize=replace(main.config.quantize, method=RoundingMethod.stochastic))
    assert stochastic(Run(own)) == "a run with these settings has no such control"
    assert stale(Run(own)) == f"To go on without it, delete {main.directory}/controls/stochastic."


def test_the_advice_for_a_stale_control_rebuilds_this_control_alone(main: Run) -> None:
    stochastic(main, settings={"quantize.method": "stochastic", "quantize.seed": 7})
    again = f"Make it again: python -m pipeline stage=controls run_dir={main.directory} overwrite=stochastic. To go"
    assert stale(main).startswith(again)


def test_more_sft_is_stale_if_sft_was_rebuilt_but_not_if_sft_was_removed(main: Run) -> None:
    directory = main.directory / "controls" / "more_sft"
    evaluated.record(directory / "sft", fingerprint="more", parents={"start": "sft"})
    evaluated.record(directory / "quantize", parents={"sft": "more"})
    write_json(directory / "control.json", {"stage": "quantize"})
    assert [made.staleness for made in controls.find_made(main)] == [None]
    evaluated.record(main.directory / "sft", fingerprint="rebuilt")
    (made,) = controls.find_made(main)
    assert made.staleness == "it continued from an earlier sft, which was rebuilt later"


def test_a_damaged_control_is_to_be_made_again_or_deleted_but_never_the_main_run(main: Run) -> None:
    directory = main.directory / "controls" / "stochastic"
    again = f"python -m pipeline stage=controls run_dir={main.directory} overwrite=stochastic/quantize"
    remedy = f"Make it again: {again}. To go on without it, delete {directory}."
    stochastic(main, files={"model.safetensors": 3})
    (made,) = controls.find_made(main)
    with pytest.raises(UserError) as caught:
        made.check_files()
    assert str(caught.value) == f"{directory}/quantize/model.safetensors: missing. {remedy}"
    with pytest.raises(UserError) as caught:
        references.find(main, made.model, (), "evaluate.source")
    assert str(caught.value).endswith(remedy)
    (directory / "quantize" / "artifact.json").write_text("{")
    with pytest.raises(UserError, match=r"not a readable artifact .* without it, delete"):
        list(controls.find_made(main))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": "nothing"}', '{"stage": "quantize", "checksum": "0"}'])
def test_an_unreadable_control_json_is_one_message(main: Run, text: str) -> None:
    file = main.directory / "controls" / "stochastic" / "control.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        list(controls.find_made(main))
    assert str(caught.value).startswith(f"{file}: not readable (")
    assert f"Make it again: python -m pipeline stage=controls run_dir={main.directory}. To go" in str(caught.value)
