"""controls=true adds the controls to a finished run, and the report compares QAT with the best of them."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHORT, linked, outcomes, run_program
from test_resume import make_interruption

from pipeline.checkpoints.reading import Checkpoint
from pipeline.runs import artifacts
from pipeline.runs.metrics import read_metrics
from pipeline.training import callbacks

SETTINGS = ("recipe=smoke", *SHORT, "controls=true")
MORE, PARTS = "controls/more_sft/quantize", "controls/bf16_parts/sft"


@pytest.fixture(scope="module")
def whole(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke run, to which controls=true has added the controls. Tests must not write to it."""
    run_dir = Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("controls") / "run", symlinks=True))
    assert run_program("stage=all", f"run_dir={run_dir}", *SETTINGS) == 0
    return run_dir


def stages(run_dir: Path) -> dict[str, str]:
    """Return the fingerprints of all stages of the controls, by their paths."""
    found = (run_dir / "controls").glob("*/*/artifact.json")
    return {
        path.parent.relative_to(run_dir).as_posix(): artifacts.load(path.parent).fingerprint
        for path in found
        if not path.parent.is_symlink()
    }


def test_only_the_controls_are_added_and_each_has_a_row(whole: Path, smoke_run: Path) -> None:
    for stage in ("upcast", "sft", "quantize", "qat", "export", "verify"):
        mine, before = (json.loads((run_dir / stage / "artifact.json").read_text()) for run_dir in (whole, smoke_run))
        assert mine == before
    rows = {row["model"]: row for row in json.loads((whole / "compare" / "compare.json").read_text())["rows"]}
    assert rows.keys() >= {"qat", "controls/stochastic/quantize", MORE, PARTS}
    assert rows[PARTS]["role"] == "BF16 parts" and rows[MORE]["role"].startswith("SFT + more SFT + PTQ (")
    findings = json.loads((whole / "compare" / "compare.json").read_text())["findings"]
    assert [line for line in findings[0]["sentences"] if line.startswith("Verdict: ")]


def test_more_sft_continues_sft_for_the_steps_of_qat_on_the_same_examples(whole: Path) -> None:
    more, qat, sft = (artifacts.load(whole / name) for name in ("controls/more_sft/sft", "qat", "sft"))
    assert more.parents["start"] == sft.fingerprint and more.data == qat.data
    assert more.details["steps"] == qat.details["steps"] == 6
    assert more.details["validation_loss_before"] == pytest.approx(sft.details["validation_loss"])
    tokens = [
        [line["num_tokens"] for line in read_metrics(each.directory) if "num_tokens" in line] for each in (more, qat)
    ]
    assert tokens[0] == tokens[1]


def test_bf16_parts_keep_the_experts_of_the_original(whole: Path) -> None:
    (source,) = (whole / "source").iterdir()
    base, parts = Checkpoint(source), Checkpoint(whole / PARTS)
    blocks = [name for name in base.tensors if name.endswith(("_blocks", "_scales"))]
    assert blocks and all(base.read(name).equal(parts.read(name)) for name in blocks)


def test_a_second_run_is_up_to_date(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stages(whole)
    assert run_program("stage=controls", f"run_dir={whole}", *SETTINGS) == 0
    said = capsys.readouterr().out
    assert stages(whole) == before and said.count("up to date") == len(before) and "done in" not in said


def test_an_interrupted_control_resumes_to_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "moved", symlinks=True))
    shutil.rmtree(run_dir / "controls" / "more_sft")
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(3))
        assert run_program("stage=controls", f"run_dir={run_dir}", *SETTINGS) == 130
    assert not (run_dir / "controls" / "more_sft" / "sft" / "artifact.json").exists()
    assert run_program("stage=controls", f"run_dir={run_dir}", *SETTINGS) == 0
    said = capsys.readouterr().out
    assert "resuming from step 3" in said and f"up to date: {run_dir}/{PARTS}" in said  # in a run that was moved
    assert stages(run_dir) == stages(whole)


def test_the_error_of_a_control_names_the_control(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=controls", f"run_dir={whole}", *SETTINGS, "qat.learning_rate=1e-3") == 2
    error = capsys.readouterr().err
    assert "control more_sft (its sft.* are the main run's qat.*): " in error
    assert "sft.learning_rate: was 0.0005, is 0.001" in error


def test_stale_controls_are_left_out_of_the_evaluation(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    record = json.loads((run_dir / "sft" / "artifact.json").read_text())
    for name in ("sft", "quantize", "qat", "export"):
        shutil.rmtree(run_dir / name)
    shutil.copytree(whole / "sft", run_dir / "sft")
    (run_dir / "sft" / "artifact.json").write_text(json.dumps({**record, "fingerprint": "rebuilt"}))
    assert run_program("stage=evaluate", f"run_dir={run_dir}", *SETTINGS, "evaluate.source=all") == 0
    assert f"{MORE}: skipped, because it is stale" in (said := capsys.readouterr()).out + said.err
    assert artifacts.load(run_dir / "evaluate").details["results"].keys() == {"upcast", "sft", PARTS}


def test_a_damaged_control_stops_only_an_evaluation_that_measures_it(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    shutil.rmtree(run_dir / "evaluate")
    damaged = run_dir / "controls" / "stochastic"
    (damaged / "quantize" / "config.json").unlink()
    assert run_program("stage=evaluate", f"run_dir={run_dir}", *SETTINGS, "evaluate.source=sft") == 0
    assert run_program("stage=evaluate", f"run_dir={run_dir}", *SETTINGS, "evaluate.source=all") == 2
    error = capsys.readouterr().err
    assert f"without it, delete {damaged}." in error
    assert "stage=controls" in error and "overwrite=stochastic/quantize. To go on" in error
    assert run_program("stage=controls", f"run_dir={run_dir}", *SETTINGS, "overwrite=stochastic/quantize") == 0
    assert capsys.readouterr().out.count("done in") == 1
    assert stages(run_dir) == stages(whole)


def test_overwrite_rebuilds_one_control_and_a_stage_of_one(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    chosen = (f"run_dir={run_dir}", *SETTINGS)
    for stage, named, rebuilt in (
        ("controls", "more_sft", ["controls/more_sft/sft", MORE]),
        ("all", "more_sft/quantize,bf16_parts", [MORE, "controls/bf16_parts/upcast", PARTS]),
    ):
        capsys.readouterr()
        assert run_program(f"stage={stage}", *chosen, f"overwrite={named}") == 0
        said = capsys.readouterr().out
        made = [line.rpartition(f"{run_dir}/")[2] for line in said.splitlines() if "done in" in line]
        assert [name for name in made if name.startswith("controls/")] == rebuilt
        assert stages(run_dir) == stages(whole)
    assert run_program("stage=controls", *chosen, "overwrite=nearest") == 2
    assert "this run makes no control nearest" in capsys.readouterr().err


def test_an_interrupted_rebuild_of_a_control_goes_on_with_the_command_of_its_message(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    chosen = ("stage=controls", f"run_dir={run_dir}", *SETTINGS, "overwrite=more_sft")
    with monkeypatch.context() as patched:
        patched.setattr(callbacks.Checkpoints, "on_save", make_interruption(3))
        assert run_program(*chosen) == 130
    error = capsys.readouterr().err
    assert "GPT_OSS_QAT_LAUNCH=" in error and "overwrite=more_sft" in error
    assert run_program(*chosen) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    assert stages(run_dir) == stages(whole)


def test_a_controls_model_can_be_evaluated_and_exported_by_its_name(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    chosen = (
        f"run_dir={run_dir}",
        *SETTINGS,
        f"export.source={PARTS}",
        f"evaluate.source={MORE.replace('quantize', 'sft')}",
    )
    for stage in ("export", "verify", "evaluate", "publish"):
        assert run_program(f"stage={stage}", *chosen, "overwrite=true") == 0
    assert "FAILED" not in outcomes(run_dir)
    assert artifacts.load(run_dir / "export").parents["model"] == artifacts.load(whole / PARTS).fingerprint
    assert "controls/more_sft/sft" in artifacts.load(run_dir / "evaluate").details["results"]
    card = (run_dir / "publish" / "model" / "README.md").read_text()
    assert card.count("| supervised fine-tuning |") == 1
    assert run_program("stage=export", f"run_dir={run_dir}", *SETTINGS, "export.source=controls/other/sft") == 2
    assert "export.source=controls/other/sft: no control of" in capsys.readouterr().err


def test_the_card_of_more_sft_has_both_trainings(whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    for stage in ("export", "verify", "publish"):
        assert (
            run_program(f"stage={stage}", f"run_dir={run_dir}", *SETTINGS, f"export.source={MORE}", "overwrite=true")
            == 0
        )
    card = (run_dir / "publish" / "model" / "README.md").read_text()
    assert [line.split()[4] for line in card.splitlines() if line.startswith("| supervised")] == ["12", "6"]


def test_bf16_parts_are_skipped_if_the_source_is_bf16(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = linked(tmp_path / "run", whole, "data")
    assert run_program("stage=upcast", f"run_dir={run_dir}", *SETTINGS, f"model.path={whole}/upcast") == 0
    source = (f"run_dir={run_dir}", *SETTINGS, f"model.path={whole}/upcast", "sft.max_steps=6", "qat.max_steps=3")
    assert run_program("stage=sft", *source) == 0 and run_program("stage=controls", *source) == 0
    assert "bf16_parts: skipped, because the source's experts are not packed" in capsys.readouterr().out
    assert {path.name for path in (run_dir / "controls").iterdir()} >= {"more_sft"}
    assert not (run_dir / PARTS).exists()


def test_a_run_that_has_no_controls_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("stage=controls", f"run_dir={tmp_path}", *SETTINGS, "train@sft=bf16_parts") == 2
    assert "there are no controls, because sft.method=bf16_parts leaves nothing to round" in capsys.readouterr().err


def test_doctor_counts_the_disk_space_of_each_control(whole: Path) -> None:
    found = artifacts.load(whole / "doctor").details["needs"]["controls"]
    assert found.keys() == {path.name for path in (whole / "controls").iterdir()}
    for name, control in found.items():
        files = [path for path in (whole / "controls" / name).glob("*/*.safetensors") if not path.parent.is_symlink()]
        size = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
        assert control["disk_bytes"] == pytest.approx(size, rel=0.05)
