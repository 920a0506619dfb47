"""stage=publish on a real run: the card agrees with the records, the files equal the export, and the upload works."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import huggingface_hub.constants
import pytest
from conftest import SHORT, run_program
from fake_hub import Hub
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from pipeline.config import Stage
from pipeline.runs import artifacts
from pipeline.stages.all import STAGES

HUB_NAMES = ("export.card.base_model=openai/gpt-oss-20b", "export.card.license=apache-2.0")

INPUTS = ("settings", "parents", "data")


@pytest.fixture
def run(smoke_run: Path, tmp_path: Path) -> Path:
    """A copy of the smoke run, which a test may change."""
    return Path(shutil.copytree(smoke_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with fake_hub.running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_only_for_tests")
        yield running


def publish(run: Path, *settings: str) -> int:
    return run_program("stage=publish", "recipe=smoke", f"run_dir={run}", *SHORT, *settings)


def card(run: Path) -> ModelCard:
    return ModelCard.load(run / "publish" / "model" / "README.md")


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_directory_is_the_export_byte_for_byte_and_a_card(run: Path) -> None:
    assert publish(run) == 0
    model, export = run / "publish" / "model", artifacts.load(run / "export")
    assert {path.name for path in model.iterdir()} == {*export.files, "README.md"}
    for name in export.files:
        assert (model / name).read_bytes() == (run / "export" / name).read_bytes()
    # The files are links, because a second copy of a released model would take 13 or 65 GB.
    assert (model / "config.json").samefile(run / "export" / "config.json")
    _, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(info.values())


def test_verify_passes_on_the_directory(run: Path, tmp_path: Path) -> None:
    assert publish(run) == 0
    arguments = ("recipe=smoke", f"run_dir={tmp_path / 'other'}", f"verify.checkpoint={run / 'publish' / 'model'}")
    assert run_program("stage=verify", *arguments, *SHORT) == 0


def test_the_metadata_are_those_that_the_hub_reads(run: Path) -> None:
    assert publish(run, *HUB_NAMES) == 0
    assert card(run).data.to_dict() == {
        "base_model": "openai/gpt-oss-20b",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt_oss", "mxfp4", "vllm", "quantization-aware-training", "conversational"],
    }


def test_the_card_tells_what_the_records_tell(run: Path) -> None:
    assert publish(run) == 0
    text = card(run).text
    export, sft, qat = (artifacts.load(run / name) for name in ("export", "sft", "qat"))
    assert f"`{export.fingerprint}`" in section(text, "Verification")
    checks = artifacts.load(run / "verify").details["checks"]
    assert section(text, "Verification").count("| ok |") == list(checks.values()).count("ok") >= 8
    assert (run / "compare" / "compare.md").read_text().strip() in text
    assert f"{export.details['survival']:.2%}" in section(text, "Effect of training on the exported weights")
    made = section(text, "How it was made")
    assert f"fingerprint `{export.parents['source']}`" in made and f"| fingerprint | `{sft.data}` |" in made
    for stage, rate in ((sft, "0.003"), (qat, "0.0005")):
        assert f"{stage.details['steps']} steps on 72 conversations" in made
        assert f"→ {stage.details['validation_loss']:.4f}" in made and f"| `learning_rate` | {rate} |" in made


def test_the_card_tells_nothing_of_this_machine(run: Path) -> None:
    assert publish(run) == 0
    text = (run / "publish" / "model" / "README.md").read_text()
    assert str(run.parent) not in text and os.uname().nodename not in text


def test_writing_the_card_leaves_a_readme_of_the_export_alone(run: Path) -> None:
    """An export contains the base model's README, beside its tokenizer and licence."""
    source = next(path for path in (run / "source").iterdir() if path.is_dir())
    own = "---\nlicense: apache-2.0\nlanguage: en\n---\n# The base model\n"
    (source / "README.md").write_text(own)
    (source / "LICENSE").write_text("the licence")
    assert run_program("stage=export", "recipe=smoke", f"run_dir={run}", *SHORT, "overwrite=true") == 0
    assert run_program("stage=verify", "recipe=smoke", f"run_dir={run}", *SHORT) == 0
    assert publish(run) == 0
    assert (run / "export" / "README.md").read_text() == own
    assert card(run).data.license == "apache-2.0"
    assert "# smoke" in card(run).text
    assert (run / "publish" / "model" / "LICENSE").read_text() == "the licence"


def test_a_gguf_gets_the_licence_of_the_base_model(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = next(path for path in (run / "source").iterdir() if path.is_dir())
    (source / "LICENSE").write_text("the licence")
    other = run.parent / "gguf"
    arguments = ("recipe=smoke", f"run_dir={other}", f"export.source={run / 'qat'}", f"model.path={source}")
    assert run_program("stage=export", *arguments, "export.target=gguf") == 0
    export = artifacts.load(other / "export")
    pass_verify(other, export.fingerprint)
    assert publish(other, f"model.path={source}", *HUB_NAMES) == 0
    assert {path.name for path in (other / "publish" / "model").iterdir()} == {"model.gguf", "README.md", "LICENSE"}
    text = (other / "publish" / "model" / "README.md").read_text()
    assert "- gguf\n" in text and "library_name" not in text and "The files beside README.md and LICENSE are" in text
    assert "| supervised fine-tuning | 12 steps" in text and "The models of this run were not compared." in text


def pass_verify(run: Path, fingerprint: str) -> None:
    """Write the artifact of a passed `verify`."""
    from pipeline.config import ModelConfig, PipelineConfig, Stage
    from pipeline.runs.artifacts import Kind, Result
    from pipeline.runs.building import build
    from pipeline.runs.records import VerifyRecord
    from pipeline.runs.run import Run

    config = PipelineConfig(stage=Stage.verify, run_dir=str(run), model=ModelConfig("base"))
    record = VerifyRecord(checks={"scales: no NaN": "ok"}, not_checked=[f"weights: {run}/export has no record"])
    parents = {"checkpoint": fingerprint}
    result = Result(Kind.report, record)
    build(Run(config), Stage.verify, settings=(), parents=parents, work=lambda _: result, is_report=True)


def test_an_export_that_verify_has_not_passed_is_not_published(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "verify")
    assert publish(run) == 2
    assert "has not passed stage=verify" in capfd.readouterr().err
    assert not (run / "publish").exists()


def test_an_export_that_an_unfinished_qat_has_overtaken_is_not_published(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run / "export" / "mxfp4" / "artifact.json"
    record = json.loads(path.read_text())
    record["details"]["exported_from"] = "quantize"
    record["parents"]["model"] = json.loads((run / "quantize" / "artifact.json").read_text())["fingerprint"]
    path.write_text(json.dumps(record))
    inputs = {name: json.loads((run / "qat" / "artifact.json").read_text())[name] for name in INPUTS}
    (run / "qat" / "artifact.json").unlink()
    (run / "qat" / "unfinished.json").write_text(json.dumps(inputs))
    assert run_program("stage=publish", f"run_dir={run}") == 2
    assert capfd.readouterr().err.endswith(
        f"error: {run}/export/mxfp4 was made from quantize, but qat has begun since and is unfinished. Finish qat:"
        f" python -m pipeline stage=qat run_dir={run}, then export and verify again: python -m pipeline stage=export"
        f" run_dir={run} export.target=mxfp4 overwrite=true. Or use this export as it is:"
        f" python -m pipeline stage=publish run_dir={run} export.source=quantize\n"
    )
    assert not (run / "publish").exists()
    assert run_program("stage=publish", f"run_dir={run}", "export.source=quantize") == 0


def test_a_file_that_changed_since_it_was_verified_is_not_published(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = next((run / "export").glob("*.safetensors"))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")  # of the same size
    assert publish(run) == 2
    assert "its files have changed since they were exported and verified" in capfd.readouterr().err
    assert not (run / "publish" / "artifact.json").exists()


def test_a_second_run_has_nothing_to_do_and_another_licence_makes_it_anew(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert publish(run) == publish(run) == 0
    assert "[publish] up to date" in capfd.readouterr().out
    assert publish(run, *HUB_NAMES) == 0
    assert "made anew, since export.card.base_model: was None" in capfd.readouterr().out
    assert card(run).data.license == "apache-2.0"


def test_the_upload_is_the_directory(run: Path, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert publish(run, "export.push_to_hub=me/mine") == 0
    model = run / "publish" / "model"
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert hub.is_private
    assert f"uploaded: {hub.url}/me/mine/commit/1" in capfd.readouterr().out
    assert "vllm serve me/mine\n" in card(run).text and "# mine\n" in card(run).text
    kept = [path.read_text() for path in (run / "publish").rglob("*.json*")] + [
        (run / "publish" / "config.yaml").read_text()
    ]
    assert not any("hf_only_for_tests" in text for text in kept)


def test_what_changed_after_it_was_made_is_not_uploaded(run: Path, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert publish(run, "export.push_to_hub=me/mine") == 0
    hub.files.clear()
    path = run / "publish" / "model" / "tokenizer_config.json"
    path.write_bytes(path.read_bytes().replace(b" ", b"\t", 1))
    assert publish(run, "export.push_to_hub=me/mine") == 2
    assert "a file has changed since it was made" in capfd.readouterr().err
    assert hub.files == {}


def test_all_ends_with_the_upload_where_that_is_asked_for(
    run: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("stage=all", "recipe=smoke", f"run_dir={run}", *SHORT, "export.push_to_hub=me/mine")
    assert run_program(*arguments) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    names = ", ".join(stage.name for stage in STAGES)
    assert [line for line in lines if "up to date" in line] == [f"[all] up to date: {names} ({run})"]
    assert lines[-1] == f"[publish] uploaded: {hub.url}/me/mine/commit/1"
    assert "model.safetensors.index.json" in hub.files
    hub.files.clear()
    assert run_program("stage=all", "recipe=smoke", f"run_dir={run}", *SHORT) == 0
    assert hub.files == {}


def test_nothing_is_uploaded_from_a_run_whose_verify_fails(
    run: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run / "export" / "chat_template.jinja"
    path.write_text(path.read_text().replace("a", "b", 1))
    arguments = ("stage=all", "recipe=smoke", f"run_dir={run}", *SHORT, "export.push_to_hub=me/mine")
    assert run_program(*arguments) == 1
    assert "chat_template.jinja" in capfd.readouterr().err
    assert hub.files == {} and not (run / "publish").exists()


@pytest.fixture
def logged_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))


def test_without_a_token_nothing_is_made(run: Path, logged_out: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert publish(run, "export.push_to_hub=me/mine") == 2
    assert "there is no token for the Hub" in capfd.readouterr().err
    assert not (run / "publish").exists()


def test_all_finds_a_missing_token_before_its_first_stage(
    tmp_path: Path, logged_out: None, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "new"
    assert run_program("stage=all", "recipe=smoke", f"run_dir={run}", *SHORT, "export.push_to_hub=me/mine") == 2
    assert "there is no token for the Hub" in capfd.readouterr().err
    assert not [stage.name for stage in Stage if (run / stage.name).exists()]
