"""TensorBoard's own reader finds the figures, texts and plots in the event files."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked_stages import DATA, FIGURES, KEPT_LOSS, LOSSES, SECRET, build_stages, configuration, verify_targets

from pipeline.config import TrackingBackend, Upload
from pipeline.errors import UserError
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics, one_hint, track


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_curves_texts_plots_and_lineage_are_in_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "a run"
    with one_hint("all"):
        upcast, sft = build_stages(configuration(run_dir, TrackingBackend.tensorboard))
    events = read(run_dir / "tensorboard" / "sft")
    assert curve(events, "sft/eval_loss") == LOSSES
    assert curve(events, "sft/router_variation/layer_0") == dict.fromkeys(LOSSES, 0.5)
    assert events.Tags()["images"] == ["plots/loss"]
    assert text(events, "tags") == "one, smoke, gpt-oss-20b, mxfp4"
    assert text(events, "tables/samples").splitlines()[2] == "| a\\|b | c |"
    assert f"| sft/validation_loss | {KEPT_LOSS} |" in text(events, "tables/summary").splitlines()
    assert upcast.fingerprint in text(events, "inputs/smoke-upcast")
    assert DATA in text(events, "inputs/data-rows.jsonl")
    assert sft.fingerprint in text(events, "outputs/smoke-sft")
    assert text(events, "status") == "complete"
    assert '"learning_rate"' in text(events, "config")
    assert not [path for path in (run_dir / "tensorboard").rglob("*.*") if SECRET.encode() in path.read_bytes()]
    assert capsys.readouterr().out.count(f"[all] to see the curves: tensorboard --logdir '{run_dir}/tensorboard'") == 1


def test_a_repeated_stage_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    run = Run(configuration(tmp_path, TrackingBackend.tensorboard))
    for steps, loss in ((range(4), 1.0), (range(2, 6), 2.0)):
        with track(run, "sft", tmp_path):
            for step in steps:
                log_metrics(tmp_path, {"step": step, "loss": loss})
    events = read(tmp_path / "tensorboard" / "sft")
    assert curve(events, "sft/loss") == {0: 1.0, 1: 1.0, 2: 2.0, 3: 2.0, 4: 2.0, 5: 2.0}
    assert len(events.Scalars("sft/loss")) == 6


def test_without_upload_only_figures_and_descriptions_are_stored(tmp_path: Path) -> None:
    build_stages(configuration(tmp_path, TrackingBackend.tensorboard, Upload.none))
    events = read(tmp_path / "tensorboard" / "sft")
    assert curve(events, "sft/eval_loss") == LOSSES
    assert events.Tags()["images"] == []
    assert "tables/samples/text_summary" not in events.Tags()["tensors"]


def test_a_directory_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    run = Run(configuration(tmp_path, TrackingBackend.tensorboard))
    expected = r"tracking=tensorboard: cannot write .*use tracking=none"
    with pytest.raises(UserError, match=expected), track(run, "sft", tmp_path):
        pytest.fail("the stage must not begin")


def test_the_proofs_of_two_exports_are_two_runs(tmp_path: Path) -> None:
    verify_targets(configuration(tmp_path, TrackingBackend.tensorboard))
    for target, figure in FIGURES.items():
        events = read(tmp_path / "tensorboard" / "verify" / target.name)
        assert curve(events, "verify/tensors") == {0: figure}
        assert "inputs/smoke-export-" + target.name + "/text_summary" in events.Tags()["tensors"]
