"""The study of rounding runs end to end and resumes, and docs/rounding.md shows the figures of its results file."""

import json
import subprocess
from pathlib import Path
from typing import Any

import forks
import pytest
import torch

from scripts.rounding_study import cells, page, plots, record, rounding, tables
from scripts.rounding_study.cells import Seed
from scripts.rounding_study.figures import Results
from scripts.rounding_study.rounding import Rounding, block_format
from scripts.rounding_study.settings import MINUTE, Settings
from scripts.rounding_study.statistics import estimate, estimate_ratio
from scripts.rounding_study.task import Habits, expect_tokens, make_rows

RESULTS = page.PAGE.with_name("rounding.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a complete seed at minute size, and its results file."""
    directory = tmp_path_factory.mktemp("study")
    record.run_seed(0, MINUTE, directory)
    assert record.collect(directory, directory / "results.json", MINUTE) == ["0"]
    return directory


def read_cells(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "seed0" / "cells.json").read_text(encoding="utf-8"))["cells"]
    return found


def test_the_page_has_the_tables_of_the_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.text(RESULTS), "run scripts/study_rounding --table"


def test_the_plots_show_the_results() -> None:
    digest = plots.digest(Results.read(RESULTS))
    for name in ("rounding_divergence.svg", "rounding_gap.svg"):
        assert digest in page.PAGE.with_name(name).read_text(encoding="utf-8"), "run scripts/study_rounding --table"


def test_the_results_are_of_the_current_settings_and_of_the_first_seeds() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["settings"] == json.loads(json.dumps(Settings().__dict__))
    assert list(found["seeds"]) == [str(number) for number in range(len(found["seeds"]))]


def test_a_complete_seed_gives_all_tables_and_plots(finished: Path) -> None:
    found = Results.read(finished / "results.json")
    assert all(make(found) for make in tables.TABLES.values())
    assert all(plot.startswith("<?xml") for plot in plots.draw(found).values())


def test_a_complete_seed_is_not_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "train", None)
    before = (finished / "seed0" / "cells.json").read_bytes()
    record.run_seed(0, MINUTE, finished)
    assert (finished / "seed0" / "cells.json").read_bytes() == before


def test_an_interrupted_seed_resumes_to_the_same_figures(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, train = [], cells.train

    def interrupt(*given: Any, **named: Any) -> None:
        calls.append(named["steps"])
        train(*given, **named)
        if len(calls) == 4:  # pretraining, the phase on the grid, and the first two fine-tunes
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            record.run_seed(0, MINUTE, tmp_path)
    before = read_cells(tmp_path)
    record.run_seed(0, MINUTE, tmp_path, most_cells=3)
    after, whole = read_cells(tmp_path), read_cells(finished)
    assert len(after) == len(before) + 3
    assert after == {name: whole[name] for name in list(whole)[: len(after)]}
    assert record.collect(tmp_path, tmp_path / "results.json", MINUTE) == []


def test_figures_of_other_settings_are_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"cells\.json: these settings of the study have changed since: hidden"):
        record.run_seed(0, Settings(**{**MINUTE.__dict__, "hidden": 64}), finished)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds and --threads must be at least 1"),
        (["--minute"], "--minute needs its own --results"),
        (["--table", "--results", "missing.json"], "missing.json"),
    ],
)
def test_mistakes_end_with_a_message(arguments: list[str], message: str) -> None:
    command = [*forks.interpreter(), str(page.ROOT / "scripts" / "study_rounding"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("form", "method", "rule"), [(f, *way) for f, ways in cells.ROUNDINGS.items() for way in ways])
def test_rounded_experts_are_values_of_the_format(finished: Path, form: str, method: str, rule: str) -> None:
    seed = Seed(0, MINUTE, finished / "seed0")
    base, tuned = seed._base("ceil"), cells._plain(seed._sft("ceil/full/10 %"))
    how = Rounding(block_format(form), method, rule, 0)
    rounded, figures = rounding.round_experts(tuned, base, how, MINUTE, seed._calibration)
    nearest = Rounding(how.form, "nearest", how.form.scale_rule, 0)
    again, _ = rounding.round_experts(rounded, base, nearest, MINUTE, seed._calibration)
    assert all(torch.equal(rounded[name], again[name]) for name in rounded)
    assert figures["kept"] is not None and figures["adjusted_blocks"] == 0


def test_expected_tokens_agree_with_draws() -> None:
    habits = Habits.of(0, is_tuned=True)
    rows = make_rows(4000, habits, 1)
    chances = expect_tokens(rows, habits)
    drawn = torch.nn.functional.one_hot(rows.ids[:, -chances.shape[1] :], chances.shape[2]).double()
    assert torch.allclose(chances.sum(dim=-1), torch.ones(()).double())
    errors = (drawn - chances).mean(dim=0)
    allowed = 5 * ((chances * (1 - chances)).mean(dim=0) / len(rows)).sqrt()
    assert bool((errors.abs() <= allowed + 1e-12).all())


def test_a_row_states_a_sum() -> None:
    """The numbers of the first row follow from its prompt: 3 numbers, 2 operations, then the two results."""
    words = [(token - 6) % 19 for token in make_rows(1, Habits.of(0, is_tuned=True), 7).ids[0].tolist()]
    compute = [lambda a, b: (a + b) % 8, lambda a, b: (a - b) % 8, max]
    middle = compute[words[3] - 8](words[2], words[4])
    assert words[13] == middle
    assert words[17] == words[19] == compute[words[5] - 8](middle, words[6])


def test_intervals_are_students() -> None:
    """The t quantile for 4 degrees of freedom is 2.776, and the standard error of 1 to 5 is 0.7071."""
    assert estimate([1.0, 2.0, 3.0, 4.0, 5.0]).show(2) == "3.00 [1.04, 4.96]"
    assert estimate([2.0]).show(2) == "2.00 [unbounded]"


def test_a_ratio_with_an_exact_denominator_has_the_interval_of_a_mean() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert estimate_ratio(values, [2.0] * 5).show(6) == estimate([value / 2 for value in values]).show(6)


def test_the_interval_of_a_ratio_covers_the_truth_in_95_of_100_cases() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(2000):
        under = 2 + 0.5 * torch.randn(5, generator=generator)
        over = 3 * under + torch.randn(5, generator=generator)
        found = estimate_ratio(over.tolist(), under.tolist())
        covered += found.low is None or found.high is None or found.low <= 3 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_a_ratio_to_nothing_is_unbounded() -> None:
    assert estimate_ratio([1.0, 2.0, 3.0], [-1.0, 1.0, 0.1]).low is None
