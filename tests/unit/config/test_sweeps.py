"""Sweeps: each job has its own directory, and shares unchanged models with the run that run_dir names."""

import json
from pathlib import Path

import pytest
from conftest import run_program
from evaluated import record

from pipeline.config import PipelineConfig, QuantizeConfig, QuantizeSource, SftConfig, Stage
from pipeline.errors import UserError
from pipeline.runs.building import build
from pipeline.runs.run import Run

SWEEP = ("recipe=smoke", "qat.learning_rate=1e-3", "format=mxfp4,nvfp4", "qat.learning_rate=choice(5e-5)")
"""A sweep with two jobs. `choice` makes a setting part of the sweep, even with only one value."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[PipelineConfig]:
    """The configurations that stages are called with. Fakes replace the stages.

    The working directory has no earlier run.
    """
    monkeypatch.chdir(tmp_path)
    found: list[PipelineConfig] = []
    monkeypatch.setattr("pipeline.runs.job.run_stage", found.append)
    return found


def places(ran: list[PipelineConfig]) -> list[tuple[str, str | None]]:
    return [(config.run_dir, config.base_run) for config in ran]


def test_each_job_has_a_directory_named_by_what_it_alone_has(ran: list[PipelineConfig], tmp_path: Path) -> None:
    assert run_program("-m", "stage=qat", *SWEEP, "data.max_samples=80", f"run_dir={tmp_path}") == 0
    names = [f"format={name},qat.learning_rate=5e-05" for name in ("mxfp4", "nvfp4")]
    assert sorted(places(ran), key=str) == [(f"{tmp_path}/sweep/{name}", str(tmp_path)) for name in names]


def test_each_job_says_its_number_and_the_settings_in_which_jobs_differ(
    ran: list[PipelineConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("-m", "stage=evaluate", *SWEEP, "evaluate.max_samples=2,3", f"run_dir={tmp_path}") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[sweep]")]
    assert lines == [
        f"[sweep] job {number} of 4: qat.learning_rate=5e-05 format={name} evaluate.max_samples={samples}"
        for number, (name, samples) in enumerate(((n, s) for n in ("mxfp4", "nvfp4") for s in (2, 3)), 1)
    ]
    assert len(ran) == 4


def test_one_job_is_not_counted(ran: list[PipelineConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("-m", "stage=qat", "recipe=smoke", "qat.seed=choice(1)") == 0
    assert "[sweep]" not in capsys.readouterr().out


def test_other_stages_of_a_sweep_find_the_same_directories(ran: list[PipelineConfig], tmp_path: Path) -> None:
    more = ("stage=evaluate", "eval=quick", "evaluate.source=quantize,qat", "overwrite=true")
    assert run_program("-m", "recipe=smoke", "format=choice(nvfp4)", *more, f"run_dir={tmp_path}") == 0
    assert [config.run_dir for config in ran] == [f"{tmp_path}/sweep/format=nvfp4"] * 2


def test_the_default_run_directory_is_shared_too(ran: list[PipelineConfig]) -> None:
    assert run_program("-m", "stage=qat", "recipe=smoke", "qat.seed=choice(1)") == 0
    assert places(ran) == [("runs/smoke/sweep/qat.seed=1", "runs/smoke")]


def test_the_flag_may_stand_at_the_end(ran: list[PipelineConfig]) -> None:
    assert run_program("stage=qat", "qat.seed=choice(1)", "recipe=smoke", "-m") == 0
    assert places(ran) == [("runs/smoke/sweep/qat.seed=1", "runs/smoke")]


@pytest.mark.parametrize("sweep", ["stage=choice(sft)", "recipe=choice(smoke)", "run_dir=choice(a)"])
def test_what_makes_no_other_model_makes_no_other_directory(sweep: str, ran: list[PipelineConfig]) -> None:
    usual = [each for each in ("stage=sft", "recipe=smoke") if not sweep.startswith(each.partition("=")[0])]
    assert run_program("-m", sweep, *usual) == 0
    assert {config.base_run for config in ran} == {None}
    assert not [config.run_dir for config in ran if "sweep" in config.run_dir]


def test_a_slash_in_a_value_makes_no_deeper_directory(ran: list[PipelineConfig], tmp_path: Path) -> None:
    assert run_program("-m", "stage=sft", "recipe=smoke", "data.path=choice(/a/b)", f"run_dir={tmp_path}") == 0
    assert [Path(config.run_dir).name for config in ran] == ["data.path=_a_b"]


def test_without_a_sweep_nothing_is_shared(ran: list[PipelineConfig]) -> None:
    assert run_program("stage=qat", "recipe=smoke", "qat.learning_rate=1e-4") == 0
    assert places(ran) == [("runs/smoke", None)]


# --- what is shared --------------------------------------------------------------------------------------------------

SETTINGS = {
    "upcast": ("model.path",),
    "sft": ("data", "sft"),
    "quantize": ("format", "quantize"),
    "qat": ("data", "format", "qat"),
}
PARENTS = {"upcast": {"source": "s"}, "sft": {"upcast": "upcast"}, "quantize": {"sft": "sft"}, "qat": {"quantize": ""}}


def job(tmp_path: Path, stage: Stage = Stage.qat, **facts: object) -> Run:
    made = PipelineConfig(stage=stage, run_dir=f"{tmp_path}/job", base_run=f"{tmp_path}/base", **facts)  # type: ignore[arg-type]
    made.model.path = "gpt"
    return Run(made)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A run with all models up to qat. It has the default settings of `job`."""
    for name, keys in SETTINGS.items():
        settings = job(tmp_path).settings(keys)
        record(tmp_path / "base" / name, settings=settings, parents=PARENTS[name])
    return tmp_path / "base"


def test_models_of_the_same_settings_are_shared_and_reports_are_not(base: Path, tmp_path: Path) -> None:
    record(base / "evaluate", kind="report")
    for name in SETTINGS:
        assert job(tmp_path).stage_dir(name) == base / name
    assert job(tmp_path).stage_dir("evaluate") == tmp_path / "job" / "evaluate"


def test_what_was_made_otherwise_or_from_what_was_is_the_jobs_own(base: Path, tmp_path: Path) -> None:
    other = job(tmp_path, sft=SftConfig(learning_rate=1.0))
    own = [name for name in SETTINGS if other.stage_dir(name) == tmp_path / "job" / name]
    assert own == ["sft", "quantize", "qat"]  # quantize and qat have the same settings, but were made from another sft


def test_a_job_that_has_its_own_uses_that(base: Path, tmp_path: Path) -> None:
    record(tmp_path / "job" / "sft")
    assert job(tmp_path).stage_dir("sft") == tmp_path / "job" / "sft"
    assert job(tmp_path).stage_dir("quantize") == tmp_path / "job" / "quantize"


def test_a_stage_that_is_rebuilt_leaves_the_shared_one_alone(base: Path, tmp_path: Path) -> None:
    rebuilt = job(tmp_path, overwrite=True)
    assert rebuilt.stage_dir("qat") == tmp_path / "job" / "qat"
    assert rebuilt.stage_dir("sft") == base / "sft"


def test_data_and_made_up_models_are_kept_once(base: Path, tmp_path: Path) -> None:
    assert job(tmp_path).stage_dir("data") == base / "data"


def test_what_comes_before_is_made_where_the_base_run_has_it(base: Path, tmp_path: Path) -> None:
    assert job(tmp_path).earlier_stages() == [Stage.upcast, Stage.sft, Stage.quantize]
    assert job(tmp_path, Stage.sft).earlier_stages() == [Stage.upcast]
    assert job(tmp_path, Stage.evaluate).earlier_stages() == []
    without_sft = job(tmp_path, quantize=QuantizeConfig(source=QuantizeSource.upcast))
    assert without_sft.earlier_stages() == [Stage.upcast, Stage.quantize]


def test_a_base_run_without_sft_is_asked_for_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"stage=sft run_dir={tmp_path}/base, or this command with"):
        job(tmp_path).require(Stage.sft)
    assert job(tmp_path).earlier_stages() == []


def test_a_shared_stage_is_up_to_date_and_is_not_made_again(base: Path, tmp_path: Path, capsys) -> None:
    asked = job(tmp_path, Stage.sft)
    artifact = build(
        asked,
        Stage.sft,
        settings=SETTINGS["sft"],
        parents=PARENTS["sft"],
        work=lambda _: pytest.fail("it was made again"),
    )
    assert artifact.directory == base / "sft"
    assert json.loads((base / "sft" / "artifact.json").read_text())["fingerprint"] == "sft"
    assert f"[sft] up to date: {base}/sft" in capsys.readouterr().out
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    "sweep",
    ["sft.learning_rate=interval(1e-5,1e-4)", "format=glob(*)", "sft.max_steps=range(1,9,0)", "sft.seed=range(1,1)"],
)
def test_a_sweep_without_listed_values_ends_with_one_message(sweep: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("-m", "stage=sft", "recipe=smoke", sweep) == 2
    key = sweep.partition("=")[0]
    message = f"error: {sweep}: does not list values for a sweep. Write them out, as in {key}=<one>,<other>.\n"
    assert capsys.readouterr().err == message


def test_a_sweep_of_a_hydra_setting_without_listed_values_ends_with_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_program("-m", "stage=sft", "recipe=smoke", "hydra.job.num=interval(1,2)") == 2
    assert capsys.readouterr().err.startswith("error: Can only enumerate CHOICE and RANGE sweeps")
