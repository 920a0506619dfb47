"""compare on real runs: its files, a second call, a sweep over formats, and mistakes on the command line."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHORT, run_program

from pipeline.compare.digits import significant
from pipeline.runs import artifacts

RECIPE = ("recipe=smoke", *SHORT)


@pytest.fixture(scope="module")
def run_dir(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke run, with an evaluated sweep over two formats."""
    run_dir = tmp_path_factory.mktemp("swept") / "run"
    shutil.copytree(smoke_run, run_dir, symlinks=True)
    sweep = (*RECIPE, f"run_dir={run_dir}", "format=mxfp4,nvfp4", "-m")
    assert run_program("stage=qat", *sweep) == 0
    assert run_program("stage=evaluate", "evaluate.source=quantize,qat", *sweep) == 0
    return run_dir


def test_compare_writes_a_page_tables_and_plots(smoke_run: Path) -> None:
    directory = smoke_run / "compare"
    assert {"compare.html", "compare.md", "compare.json", "tests.jsonl"} <= {path.name for path in directory.iterdir()}
    plots = {path.stem for path in directory.glob("*.png")}
    assert {"loss-sft", "loss-qat", "tradeoff", "layers-changed-codes"} <= plots
    page = (directory / "compare.html").read_text(encoding="utf-8")
    assert all(f'<figure id="{name}">' in page for name in plots)
    assert "## SFT → PTQ → QAT" in (directory / "compare.md").read_text(encoding="utf-8")


def test_the_report_decides_about_the_verified_export_and_has_no_local_path(smoke_run: Path) -> None:
    directory = smoke_run / "compare"
    report = json.loads((directory / "compare.json").read_text(encoding="utf-8"))
    assert [verdict["outcome"] for verdict in report["verdicts"]] == ["not_measured"]  # it has no answers
    assert report["verdicts"][0]["headline"].startswith("Not measured: the MXFP4 export has no answers to compare with")
    records = {"artifact.json", "config.yaml"}
    files = [path for path in directory.iterdir() if path.suffix in (".html", ".md", ".json", ".jsonl")]
    assert not [path for path in files if path.name not in records and str(smoke_run.parent) in path.read_text()]
    page = (directory / "compare.html").read_text(encoding="utf-8")
    checks = json.loads((smoke_run / "verify" / "artifact.json").read_text())["details"]["checks"]
    passed = list(checks.values()).count("ok")
    assert "evaluated on " in page and "qat.learning_rate=0.0005" in page and f"{passed} checks passed" in page


def test_the_accounts_of_rounding_are_those_of_quantize_and_export(smoke_run: Path) -> None:
    rows = {row["model"]: row for row in json.loads((smoke_run / "compare" / "compare.json").read_text())["rows"]}
    accounts = {stage: artifacts.load(smoke_run / stage).details["account"] for stage in ("quantize", "export")}
    for model, stage in (("quantize", "quantize"), ("qat", "export"), ("export", "export")):
        assert rows[model]["rounding"] == {"method": "nearest, ceil", "account": accounts[stage]}
    assert accounts["quantize"] != accounts["export"] and "rounding" not in rows["sft"]
    table = (smoke_run / "compare" / "what_rounding_kept.jsonl").read_text()
    assert f"{significant(100 * accounts['export']['kept'])} %" in table


def test_a_new_export_brings_the_report_up_to_date(smoke_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))
    again = ("stage=export", *RECIPE, f"run_dir={run}", "overwrite=true")
    assert run_program(*again, "export.source=sft") == 0
    assert run_program("stage=evaluate", *RECIPE, f"run_dir={run}", "evaluate.source=qat") == 0
    assert run_program("stage=compare", *RECIPE, f"run_dir={run}") == 0
    rows = {row["model"]: row for row in json.loads((run / "compare" / "compare.json").read_text())["rows"]}
    assert "rounding" not in rows["qat"] and "rounding" in rows["quantize"]


def test_a_second_call_shows_the_table_and_rebuilds_nothing(
    smoke_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (smoke_run / "compare" / "compare.html").stat().st_mtime_ns
    assert run_program("stage=compare", *RECIPE, f"run_dir={smoke_run}") == 0
    out = capsys.readouterr().out
    assert "[compare] up to date" in out and "SFT + QAT, exported" in out and "compare.html" in out
    assert (smoke_run / "compare" / "compare.html").stat().st_mtime_ns == before


def test_jobs_of_a_sweep_share_stages_with_unchanged_settings(run_dir: Path) -> None:
    jobs = {job.name: {path.name for path in job.iterdir() if path.is_dir()} for job in (run_dir / "sweep").iterdir()}
    assert jobs == {
        "format=mxfp4": {"evaluate"},  # has the run's settings, so it shares the run's other stages
        "format=nvfp4": {"quantize", "qat", "evaluate"},
    }


def test_a_report_over_a_run_and_its_sweep_has_a_directory_of_its_own(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = f"compare.runs=[{run_dir},{run_dir}/sweep/*]"
    before = (run_dir / "compare" / "artifact.json").read_bytes()
    assert run_program("stage=compare", *RECIPE, f"run_dir={run_dir}", everything) == 0
    assert (run_dir / "compare" / "artifact.json").read_bytes() == before
    place = run_dir.parent / "comparisons" / "run+format=mxfp4+format=nvfp4" / "compare"
    report = json.loads((place / "compare.json").read_text())
    # The first job shares its models with the run. The report shows each shared model once.
    assert [(row["run"], row["model"], row["format"]) for row in report["rows"]] == [
        *(("run", name, None) for name in ("upcast", "sft")),
        *(("run", name, "mxfp4") for name in ("quantize", "qat", "export")),
        *(("format=nvfp4", name, "nvfp4") for name in ("quantize", "qat")),
    ]
    assert all(row["loss_change"] is not None for row in report["rows"] if row["model"] in ("quantize", "qat"))
    titles = [finding["title"] for finding in report["findings"]]
    assert titles == [
        "run: SFT → run: PTQ → run: QAT",
        "run: SFT → format=nvfp4: PTQ → format=nvfp4: QAT",
        "nvfp4 against mxfp4",
    ]
    assert "format=nvfp4: QAT" in capsys.readouterr().out


def test_the_directory_of_a_report_over_several_runs_can_be_chosen(run_dir: Path, tmp_path: Path) -> None:
    runs = f"compare.runs=[{run_dir},{run_dir}/sweep/*]"
    assert run_program("stage=compare", *RECIPE, f"run_dir={tmp_path}/mine", runs) == 0
    assert run_program("stage=compare", *RECIPE, f"run_dir={tmp_path}/mine", runs, "compare.name=formats") == 0
    assert (tmp_path / "mine" / "compare" / "compare.html").is_file()
    assert (tmp_path / "comparisons" / "formats" / "compare" / "compare.html").is_file()


@pytest.mark.parametrize("setting", ["compare.name=a/b", "compare.name=..", "compare.margin=0", "compare.margin=100"])
def test_a_bad_setting_of_the_report_is_named(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=compare", *RECIPE, f"run_dir={tmp_path}", setting) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


def test_runs_on_other_data_are_refused_in_one_message(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other", symlinks=True))
    short = [each for each in RECIPE if "max_samples" not in each]
    arguments = (*short, "data.max_samples=60", f"run_dir={other}")
    assert run_program("stage=evaluate", "evaluate.source=upcast", *arguments) == 0
    capsys.readouterr()
    assert run_program("stage=compare", *RECIPE, f"run_dir={run_dir}", f"compare.runs=[{run_dir},{other}]") == 2
    error = capsys.readouterr().err
    assert f"{run_dir} and {other} cannot be compared" in error
    assert "data.max_samples=80 and data.max_samples=60" in error


def test_a_pattern_without_runs_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = f"{tmp_path}/none/*"
    assert run_program("stage=compare", *RECIPE, f"run_dir={tmp_path}", f"compare.runs=[{pattern}]") == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: compare.runs: '{pattern}': no directory matches. Give run directories, or patterns like runs/*.\n"
    )
    assert list(tmp_path.iterdir()) == []
