"""Inputs and outputs are described by their contents, under the name of the run that made them."""

from dataclasses import replace
from pathlib import Path

import pytest
from tracked_stages import DATA, build_stages, configuration

from pipeline.config import Stage, TrackingBackend, TrackingConfig
from pipeline.runs.artifacts import Artifact, load
from pipeline.runs.run import Run
from pipeline.runs.trackers import lineage


@pytest.fixture
def stages(tmp_path: Path) -> tuple[Run, Artifact, Artifact]:
    config = configuration(tmp_path, TrackingBackend.none)
    return Run(config), *build_stages(config)


def test_each_kind_of_parent_is_found(stages: tuple[Run, Artifact, Artifact]) -> None:
    run, upcast, sft = stages
    parents = {"source": "b" * 32, "upcast": upcast.fingerprint, "model": sft.fingerprint, "evaluate.prompts": "p" * 32}
    found = [(item.kind, item.name, item.fingerprint) for item in lineage.inputs(run, parents, DATA)]
    assert found == [
        ("dataset", "data-rows.jsonl", DATA),
        ("model", "base-gpt-oss-20b", "b" * 32),
        ("model", "smoke-upcast", upcast.fingerprint),
        ("model", "smoke-sft", sft.fingerprint),
    ]


def test_a_stage_that_was_rebuilt_is_not_named_as_the_input(stages: tuple[Run, Artifact, Artifact]) -> None:
    run, _, _ = stages
    assert list(lineage.inputs(run, {"upcast": "0" * 32}, None)) == []


def test_a_linked_stage_keeps_the_name_of_the_run_that_made_it(
    stages: tuple[Run, Artifact, Artifact], tmp_path: Path
) -> None:
    run, upcast, _ = stages
    control = tmp_path / "controls" / "more"
    control.mkdir(parents=True)
    (control / "upcast").symlink_to(upcast.directory)
    own = replace(run.config, run_dir=str(control), tracking=TrackingConfig(name="smoke-more"))
    (item,) = lineage.inputs(Run(own), {"upcast": upcast.fingerprint}, None)
    assert item == lineage.describe(upcast)
    assert item.name == "smoke-upcast"


def test_a_description_is_the_same_for_the_same_contents(stages: tuple[Run, Artifact, Artifact]) -> None:
    run, upcast, _ = stages
    assert lineage.describe(load(run.stage_dir(Stage.upcast))) == lineage.describe(upcast)


def test_names_have_only_characters_that_all_trackers_allow() -> None:
    assert lineage.item_name("a run", "ü/b", "c.d") == "a-run--b-c.d"
    assert len(lineage.item_name("x" * 300)) == 100


def test_final_figures_are_the_numbers_of_each_model(stages: tuple[Run, Artifact, Artifact]) -> None:
    _, _, sft = stages
    assert lineage.final_figures(sft)["sft/kept_step"] == 4.0
    results = {"qat": {"validation_loss": 2.0, "groups": {"a": 1.0}}, "sft": {"validation_loss": 1.0, "note": "text"}}
    evaluated = replace(sft, stage="evaluate", details={"results": results})
    assert lineage.final_figures(evaluated) == {"qat/validation_loss": 2.0, "sft/validation_loss": 1.0}
