"""Two export targets in one run: each is verified, evaluated, compared, published and served by its name."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import SHORT, run_program

from pipeline.runs import artifacts

RECIPE = ("recipe=smoke", *SHORT)


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the smoke run (mxfp4), with a second export (bf16) that is verified, evaluated and compared."""
    run = Path(shutil.copytree(smoke_run, tmp_path_factory.mktemp("targets") / "run", symlinks=True))
    for stage in ("export", "verify", "evaluate", "compare"):
        assert command(run, stage, *(["export.target=bf16"] if stage == "export" else [])) == 0
    return run


def command(run: Path, stage: str, *overrides: str) -> int:
    return run_program(f"stage={stage}", f"run_dir={run}", *RECIPE, *overrides)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_the_second_export_leaves_every_byte_of_the_first(run: Path, smoke_run: Path) -> None:
    assert contents(run / "export" / "mxfp4") == contents(smoke_run / "export" / "mxfp4")
    assert contents(run / "verify" / "mxfp4") == contents(smoke_run / "verify" / "mxfp4")
    assert contents(run / "export") == contents(run / "export" / "bf16")


def test_transformers_loads_the_directory_that_shows_the_last_export(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(run / "export", output_loading_info=True)
    assert not any(info.values())


def test_each_proof_is_of_its_own_export(run: Path) -> None:
    for target in ("mxfp4", "bf16"):
        proof = artifacts.load(run / "verify" / target)
        assert proof.parents["checkpoint"] == artifacts.load(run / "export" / target).fingerprint
    assert artifacts.load(run / "verify").fingerprint == artifacts.load(run / "verify" / "bf16").fingerprint


def test_all_is_up_to_date_and_shows_its_own_target_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "all", "evaluate.source=all") == 0
    assert "up to date: doctor, upcast, sft, quantize, qat, export, verify, evaluate, compare" in (
        capsys.readouterr().out
    )
    assert contents(run / "export") == contents(run / "export" / "mxfp4")


def test_evaluate_and_compare_have_a_row_for_each_export(run: Path) -> None:
    measured = artifacts.load(run / "evaluate")
    assert measured.parents["export"] == artifacts.load(run / "export" / "mxfp4").fingerprint
    assert measured.parents["export/bf16"] == artifacts.load(run / "export" / "bf16").fingerprint
    rows = {row["model"]: row for row in json.loads((run / "compare" / "compare.json").read_text())["rows"]}
    assert rows["export/bf16"]["role"] == "SFT + QAT, exported as bf16"
    assert rows["export/bf16"]["weight_bytes"] > 1.9 * rows["export"]["weight_bytes"]
    assert rows["export/bf16"]["relative_weight_error"] == rows["export"]["relative_weight_error"]


def test_the_report_lists_each_export_with_size_and_proof(run: Path) -> None:
    text = (run / "compare" / "compare.md").read_text()
    lines = [
        line for line in text.partition("## Exports")[2].partition("##")[0].splitlines() if line.startswith("| export")
    ]
    assert [[cell.strip() for cell in line.split("|")[1:4]] for line in lines[1:]] == [
        ["export", "mxfp4", "qat"],
        ["export/bf16", "bf16", "qat"],
    ]
    assert all("yes: " in line for line in lines[1:])


def test_the_card_of_one_export_names_the_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "publish", "export.target=mxfp4") == 0
    assert command(run, "publish", "export.target=bf16") == 0
    cards = {target: (run / "publish" / target / "model" / "README.md").read_text() for target in ("mxfp4", "bf16")}
    assert "| plain BF16 that holds the values of the 4-bit format" in cards["mxfp4"].partition("## Other layouts")[2]
    assert "| MXFP4 in the layout of the original" in cards["bf16"].partition("## Other layouts")[2]
    assert (run / "publish" / "model" / "README.md").read_text() == cards["bf16"]


def test_serve_starts_the_export_that_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for target in ("mxfp4", "bf16"):
        assert command(run, "serve", f"export.target={target}", "serve.dry_run=true") == 0
        assert f"vllm serve {run}/export/{target} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("export/gguf", "export/gguf, which is missing. Run first: python -m pipeline stage=export"),
        ("export/float", "evaluate.source=export/float: neither a stage"),
    ],
)
def test_an_export_that_is_not_there_is_named(
    run: Path, source: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "evaluate", f"evaluate.source={source}") == 2
    assert message in capsys.readouterr().err


def test_a_rebuilt_export_invalidates_its_own_proof_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    before = contents(copy / "export" / "mxfp4")
    assert command(copy, "export", "export.target=bf16", "export.source=sft", "export.requantize=true") == 2
    assert "export/bf16 is complete, but was made with other inputs: export.requantize" in capsys.readouterr().err
    assert command(copy, "export", "export.target=bf16", "export.source=quantize", "overwrite=true") == 0
    assert contents(copy / "export" / "mxfp4") == before
    assert command(copy, "serve", "export.target=mxfp4", "serve.dry_run=true") == 0
    capsys.readouterr()
    assert command(copy, "serve", "export.target=bf16", "serve.dry_run=true") == 2
    assert "export/bf16: has not passed stage=verify. Run first: " in capsys.readouterr().err


def test_a_failed_proof_leaves_the_other_proof_and_shows_its_report(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    path = copy / "export" / "bf16" / "chat_template.jinja"
    path.write_text(path.read_text().replace("a", "b", 1))
    assert command(copy, "verify", "export.target=bf16") == 1
    assert not (copy / "verify" / "artifact.json").exists()
    assert json.loads((copy / "verify" / "report.json").read_text())["target"] == "bf16"
    assert artifacts.load(copy / "verify" / "mxfp4")


def test_a_file_that_took_the_place_of_a_link_is_not_passed_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    assert command(copy, "export") == 0
    path = copy / "export" / "chat_template.jinja"
    text = path.read_text().replace("a", "b", 1)
    path.unlink()
    path.write_text(text)
    for more in ((), (f"verify.checkpoint={copy / 'export'}",)):
        assert command(copy, "verify", *more) == 1
        assert f"{copy / 'export'} is not right" in capsys.readouterr().err
    assert command(copy, "publish") == 2
    assert f"{path}: differs from {copy}/export/mxfp4/chat_template.jinja" in capsys.readouterr().err


def test_the_proof_of_another_directory_leaves_the_proof_of_the_export(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run / "export" / "mxfp4", tmp_path / "other"))
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    before = contents(copy / "verify" / "mxfp4")
    assert command(copy, "verify", f"verify.checkpoint={other}") == 0
    assert contents(copy / "verify" / "mxfp4") == before
    assert contents(copy / "verify") == contents(copy / "verify" / "checkpoint")
