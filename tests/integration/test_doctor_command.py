"""stage=doctor from the command line: its report, its warnings, and its error messages."""

from pathlib import Path
from typing import Any

import pytest
from conftest import run_program
from data_files import jsonl

from pipeline.runs import artifacts

ANSWER = {"role": "assistant", "thinking": "I add the two.", "content": "5"}


def ask(text: str, answer: dict[str, Any] = ANSWER) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, answer]}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor") / "run"


def doctor(run_dir: Path, *arguments: str) -> int:
    return run_program("stage=doctor", "recipe=smoke", f"run_dir={run_dir}", *arguments)


def test_doctor_can_be_the_first_stage(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(run_dir) == 0
    out = capsys.readouterr().out
    assert "of which 360 are trained on and 40 held out" in out
    assert "supervised            <|channel|>" in out
    assert sorted(path.name for path in run_dir.iterdir() if path.is_dir()) == ["data", "doctor", "source"]


def test_its_figures_equal_those_of_training(run_dir: Path, smoke_run: Path) -> None:
    assert doctor(run_dir, "data.max_samples=80") == 0
    data = artifacts.load(run_dir / "doctor").details["data"]
    trained = artifacts.load(smoke_run / "sft").details
    for name in ("train", "validation"):
        assert data["rows"][name] == trained[f"{name}_rows"]
    assert data["tokens"]["all"] == trained["train_tokens"] + trained["validation_tokens"]
    assert data["tokens"]["supervised"] == trained["train_supervised_tokens"] + trained["validation_supervised_tokens"]


@pytest.mark.parametrize("stage", ["upcast", "sft", "quantize", "qat", "export"])
def test_stages_leave_the_bytes_that_it_predicts(smoke_run: Path, stage: str) -> None:
    record = artifacts.load(smoke_run / stage)
    weights = sum(size for name, size in record.files.items() if name.endswith(".safetensors"))
    predicted = artifacts.load(smoke_run / "doctor").details["needs"]["disk_bytes"]
    # quantize hard-links sft's weights, so doctor predicts no bytes for them
    assert weights == pytest.approx(predicted["sft" if stage == "quantize" else stage], rel=0.05)


def test_a_second_run_is_up_to_date_and_shows_the_chosen_row(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(run_dir, "data.max_samples=80") == 0
    capsys.readouterr()
    assert doctor(run_dir, "data.max_samples=80", "doctor.row=3") == 0
    out = capsys.readouterr().out
    assert "[doctor] up to date" in out and "[doctor] row 3 (synthetic://arithmetic: row 3)" in out


def test_another_export_target_brings_the_report_up_to_date(run_dir: Path) -> None:
    needs = {}
    for target in ("mxfp4", "bf16"):
        assert doctor(run_dir, "data.max_samples=80", f"export.target={target}") == 0
        needs[target] = artifacts.load(run_dir / "doctor").details["needs"]
    parameters = needs["bf16"]["parameters"]
    others = 2 * (parameters["all"] - parameters["experts"])
    experts = {target: each["disk_bytes"]["export"] - others for target, each in needs.items()}
    assert experts["bf16"] / experts["mxfp4"] == 16 / 4.25


def test_settings_of_the_rounded_experts_bring_the_report_up_to_date(run_dir: Path) -> None:
    rounded = []
    for arguments in (
        (),
        ("qat.rounded_cache_gib=0",),
        ("sharding=fsdp2",),
        ("sharding=fsdp2", "qat.rounded_cache_gib=1"),
    ):
        assert doctor(run_dir, "data.max_samples=80", *arguments) == 0
        needs = artifacts.load(run_dir / "doctor").details["needs"]
        rounded.append(needs["device_bytes"]["qat"]["rounded"])
    default, none, gathered, budgeted = rounded  # by default, a CPU has a cache
    assert none == gathered == 0
    assert default == budgeted > 0


def test_the_form_of_the_experts_brings_the_report_up_to_date(run_dir: Path) -> None:
    lora = ("data.max_samples=80", "train@sft=lora", "train@qat=lora")
    found = []
    for arguments in ((), ("upcast.experts=bf16",), ("upcast.experts=bf16", "quantize.source=upcast")):
        assert doctor(run_dir, *lora, *arguments) == 0
        needs = artifacts.load(run_dir / "doctor").details["needs"]
        found.append((needs["disk_bytes"]["upcast"] > 0, needs["disk_bytes"]["sft"] > 0))
    assert found == [(False, True), (True, True), (True, False)]


def test_findings_are_warnings_and_are_kept_in_the_report(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [ask(f"What is {i} + {i}?") for i in range(60)] + [ask(f"what is {i}  +  {i}?") for i in range(60)]
    rows.append(ask("Hello there", {"role": "assistant", "content": "<think>Hm.</think> Hello."}))
    path = jsonl(tmp_path / "chats.jsonl", [*rows, rows[0]])
    assert doctor(run_dir, f"data.path={path}", "data.max_samples=null", "data.max_length=100") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[doctor] warning: ")]
    found = artifacts.load(run_dir / "doctor").details["findings"]
    assert [line.partition(". ")[2] for line in warnings] == found
    for part in ("<think> (1)", "without reasoning", "copy another"):
        assert any(part in message for message in found), part
    assert not any("prompt is also in the training rows" in message for message in found)  # the split is by prompt


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("doctor.row=0",), ("doctor.row=0", "greater than 0")),
        (("doctor.row=9999",), ("doctor.row=9999", "synthetic://arithmetic has 4000 rows")),
        (("doctor.languages=[en]",), ("doctor.languages=['en']", "at least two different languages")),
        (("doctor.languages=[en,dde]",), ("doctor.languages: 'dde': not known",)),
        (("data.path=/nowhere.jsonl",), ("data.path=/nowhere.jsonl", "no such file")),
        (("model.path=/nowhere/model",), ("model.path=/nowhere/model: no such directory",)),
        (("doctor.rows=3",), ("'doctor.rows'", "Did you mean 'doctor.row'")),
    ],
)
def test_a_mistake_is_one_message(
    run_dir: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    capsys.readouterr()
    assert doctor(run_dir, *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert all(part in err for part in parts), err


def test_special_tokens_in_a_row_are_refused_with_file_and_row(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "chats.jsonl", [ask("Hello"), ask("Stop <|end|> here")])
    assert doctor(run_dir, f"data.path={path}") == 2
    assert f"{path}: row 2: messages[0].content contains the special token <|end|>" in capsys.readouterr().err
