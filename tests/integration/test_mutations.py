"""Every known defect of an export is detected and named.

The trained model reveals all defects. The base model alone reveals only some of them. `mutations.py` marks the defects
that need the trained model. For these defects, `verify` with only the base model must report no problem.
"""

import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import SHORT, run_program
from mutations import MUTATIONS, SQUARE, Mutation
from mutations_of_layouts import OF_LAYOUT
from run_files import source_of

from pipeline import verify
from pipeline.checkpoints.reading import Checkpoint
from pipeline.export import EXPORTERS, recognize
from pipeline.models import references
from pipeline.models.references import ModelRef
from pipeline.numerics.formats import MXFP4
from pipeline.runs import artifacts
from pipeline.verify.trained import TrainedModel

ROOT = Path(__file__).parents[2]


class Run:
    """A run with an export, its base model and its trained model."""

    def __init__(self, run_dir: Path, target: str, ref: ModelRef, base: Path) -> None:
        self.export, self.target, self.base = run_dir / "export" / target, target, base
        ids = torch.arange(20)[None]
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        self.trained = TrainedModel(ref, [batch], MXFP4)

    def break_copy(self, mutation: Mutation, directory: Path) -> Path:
        """Make a copy with the mutation. Unchanged files are links."""
        shutil.copytree(self.export, directory, copy_function=os.link)
        mutation.break_(directory, self.base)
        return directory

    def problems_with_model(self, export: Path) -> list[str]:
        """Return the problems found with the trained model.

        The checks of logits and of the distance from the base model are left out.
        """
        target, base = EXPORTERS[self.target], Checkpoint(self.base)
        found = [
            *verify.check_tensors(export, target, base).problems,
            *verify.check_files(export, self.target, base).problems,
        ]
        if found:
            return found
        view = verify.view_export(export, self.target, self.base)
        checks = (self.trained.check_experts(view), self.trained.check_others(view))
        return [problem for check in checks for problem in check.problems]

    def problems_with_base(self, export: Path) -> list[str]:
        """Return the problems that `verify` finds if it knows only the export's directory and the base model."""
        checks = verify.check_against_base(export, recognize(export), self.base)
        return [problem for check in checks for problem in check.problems]


def model_of(run_dir: Path, stage: str) -> ModelRef:
    return references.of_artifact(artifacts.load(run_dir / stage))


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run_dir = Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("mutations") / "run", symlinks=True))
    settings = (f"run_dir={run_dir}", "overwrite=true", "export.shard_bytes=150000")
    assert run_program("stage=export", "recipe=smoke", *SHORT, *settings) == 0
    return Run(run_dir, "mxfp4", model_of(run_dir, "qat"), source_of(run_dir))


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with hidden = intermediate. It has no training, because only the layout matters here."""
    run_dir = tmp_path_factory.mktemp("square") / "run"
    settings = (f"run_dir={run_dir}", "model.tiny.intermediate_size=64", "export.source=upcast")
    for stage in ("upcast", "export"):
        assert run_program(f"stage={stage}", "recipe=smoke", *SHORT, *settings) == 0
    return Run(run_dir, "mxfp4", model_of(run_dir, "upcast"), source_of(run_dir))


@pytest.fixture(scope="module")
def exported_as(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A function that exports the smoke run's qat model to a target. Each export is made once."""

    @cache
    def make(target: str) -> Run:
        run_dir = tmp_path_factory.mktemp(target) / "run"
        settings = (f"run_dir={run_dir}", f"export.source={smoke_run / 'qat'}", f"export.target={target}")
        assert run_program("stage=export", "recipe=smoke", *SHORT, *settings, "export.shard_bytes=150000") == 0
        return Run(run_dir, target, model_of(smoke_run, "qat"), source_of(smoke_run))

    return make


def assert_named(problems: list[str], named: str) -> None:
    assert any(named in problem for problem in problems), problems


def ids(mutations: list[Mutation]) -> list[str]:
    return [mutation.name for mutation in mutations]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=ids(MUTATIONS))
def test_mutation_is_caught_and_named(run: Run, tmp_path: Path, mutation: Mutation) -> None:
    export = run.break_copy(mutation, tmp_path / "export")
    assert_named(run.problems_with_model(export), mutation.named)
    if mutation.shows_against_base:
        assert_named(run.problems_with_base(export), mutation.named)
    else:
        assert run.problems_with_base(export) == []


@pytest.mark.parametrize("mutation", SQUARE, ids=ids(SQUARE))
def test_mutation_that_shapes_hide_is_caught_and_named(square: Run, tmp_path: Path, mutation: Mutation) -> None:
    export = square.break_copy(mutation, tmp_path / "export")
    assert_named(square.problems_with_model(export), mutation.named)
    assert_named(square.problems_with_base(export), mutation.named)


@pytest.mark.parametrize(
    ("target", "mutation"),
    [pytest.param(name, each, id=f"{name}: {each.name}") for name, every in OF_LAYOUT.items() for each in every],
)
def test_mutation_of_another_layout_is_caught_and_named(
    exported_as: Callable[[str], Run], tmp_path: Path, target: str, mutation: Mutation
) -> None:
    other_layout = exported_as(target)
    export = other_layout.break_copy(mutation, tmp_path / "export")
    assert_named(other_layout.problems_with_model(export), mutation.named)
    if mutation.shows_against_base:
        assert_named(other_layout.problems_with_base(export), mutation.named)
    else:
        assert other_layout.problems_with_base(export) == []


@pytest.mark.parametrize("target", OF_LAYOUT)
def test_good_export_in_another_layout_has_no_problems_and_is_recognized(
    exported_as: Callable[[str], Run], target: str
) -> None:
    other_layout = exported_as(target)
    assert recognize(other_layout.export) == other_layout.target
    assert other_layout.problems_with_model(other_layout.export) == []
    assert other_layout.problems_with_base(other_layout.export) == []


@pytest.mark.parametrize("which", ["run", "square"])
def test_good_export_has_no_problems_and_is_unchanged(which: str, request: pytest.FixtureRequest) -> None:
    """This test runs after all mutations, so it shows that none of them wrote through a link to the good export."""
    good: Run = request.getfixturevalue(which)
    assert good.problems_with_model(good.export) == good.problems_with_base(good.export) == []
    assert artifacts.fingerprint_of(good.export)[0] == artifacts.load(good.export).fingerprint


def test_export_has_several_shards_to_break(run: Run) -> None:
    assert len(Checkpoint(run.export).weight_files()) > 3


def test_the_pages_say_how_many_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests above check each mutation. This test checks the counts in the documentation."""
    every = [*MUTATIONS, *SQUARE, *(mutation for of_layout in OF_LAYOUT.values() for mutation in of_layout)]
    caught, with_base = len(every), sum(mutation.shows_against_base for mutation in every)
    page, readme = (
        re.sub(r"\s+", " ", (ROOT / name).read_text(encoding="utf-8")) for name in ("docs/verify.md", "README.md")
    )
    with capsys.disabled():
        print(f"\ncaught: {caught} of {len(every)} with the trained model, {with_base} with only the base model")
    assert f"break a good export in {len(every)} ways" in page
    assert (
        f"catches all {caught} with the trained model, and {with_base} of the {caught} with only the base model" in page
    )
    assert f"break a good export in {len(every)} ways" in readme
    assert f"it finds all {caught} errors. If it has only the base model, it finds {with_base}." in readme
