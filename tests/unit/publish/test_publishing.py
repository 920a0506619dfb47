"""Facts in a run's records that a model card shows, and facts that it must not show."""

from pathlib import Path
from typing import Any

import pytest
from exports import make_export, prove
from huggingface_hub import ModelCard

from pipeline.config import CardConfig, ExportConfig, ExportTarget, ModelConfig, PipelineConfig, Stage
from pipeline.config.targets import TARGETS
from pipeline.models.source import Source
from pipeline.publish import card, record
from pipeline.publish.record import Proven
from pipeline.runs import provenance
from pipeline.runs.artifacts import Artifact, Kind, Result
from pipeline.runs.building import build
from pipeline.runs.records import CompareRecord, DoctorRecord, EvaluateRecord, StageRecord, TrainingRecord
from pipeline.runs.run import Run


@pytest.fixture(autouse=True)
def without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the git commit out of records, because asking git would take longer than the rest of a test."""
    monkeypatch.setattr(provenance, "_git_commit", lambda: None)


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    return PipelineConfig(stage=Stage.publish, run_dir=str(tmp_path / "run"), model=ModelConfig("openai/gpt-oss-20b"))


TRAINED = TrainingRecord(
    dtype="float32",
    steps=3,
    kept_step=3,
    train_loss_first=2.0,
    train_loss_last=1.0,
    validation_loss_before=2.0,
    validation_loss=1.0,
    counts={"train_rows": 9, "validation_rows": 1},
)


def stage(config: PipelineConfig, name: Stage, left: StageRecord = TRAINED, **inputs: Any) -> Artifact:
    result = Result(Kind.report, left)
    inputs = {"parents": {}, "settings": (), **inputs}
    return build(Run(config), name, work=lambda _: result, is_report=True, **inputs)


def card_of(config: PipelineConfig, export: Artifact, base: Path, added: list[str]) -> str:
    proven = Proven(export, prove(config, export), Source(base, "f"))
    return card.write_text(Run(config), config.model, config.export, proven=proven, added=added)


def test_every_export_target_has_a_row() -> None:
    assert set(TARGETS) == {target.name for target in ExportTarget}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("made from /home/me/runs/x/qat, is gone", "made from qat, is gone"),
        ("see ~/runs/export and ./a/b and ../c/d", "see export and b and d"),
        ("https://huggingface.co/openai/gpt-oss-20b", "https://huggingface.co/openai/gpt-oss-20b"),
        ("openai/gpt-oss-20b, 12 / 7 and 3/4", "openai/gpt-oss-20b, 12 / 7 and 3/4"),
        ("| /data/models/mine | 0.1 |", "| mine | 0.1 |"),
    ],
)
def test_of_paths_only_the_last_part_is_shown(text: str, shown: str) -> None:
    assert record.without_directories(text) == shown


def test_the_stages_of_the_model_are_followed_back_by_their_fingerprints(config: PipelineConfig) -> None:
    sft = stage(config, Stage.sft)
    qat = stage(config, Stage.qat, parents={"sft": sft.fingerprint})
    export = make_export(config, parents={"model": qat.fingerprint, "source": "s"})
    assert [each.stage for each in record.lineage(export)] == ["sft", "qat"]
    other = make_export(config, parents={"model": "another", "source": "s"})
    assert record.lineage(other) == []


def test_the_settings_of_adapters_are_told_only_of_adapters(config: PipelineConfig) -> None:
    made = stage(config, Stage.sft, settings=("sft",))
    assert not [name for name in record.training(made)["settings"] if name.startswith("lora.")]
    config.overwrite = True
    config.sft.method = type(config.sft.method).lora
    made = stage(config, Stage.sft, settings=("sft",))
    assert record.training(made)["settings"]["lora.targets"] == "attention, experts"


def test_data_sets_of_the_hub_are_named_and_files_of_this_machine_only_by_their_name(config: PipelineConfig) -> None:
    settings: dict[str, Any] = {"data.path": "/home/me/chats.jsonl", "data.revision": None, "data.blend": []}
    settings |= {"data.seed": 42, "data.max_length": 512}
    local = stage(config, Stage.sft, data="f")
    local = type(local)(**{**vars(local), "settings": settings})
    assert record.data(local)["conversations"] == "chats.jsonl"
    assert record.hub_data_sets(local) == []
    blend = [{"path": "a/b", "weight": 3, "revision": "v1"}, {"path": "/x/y.jsonl", "weight": 1, "revision": None}]
    blended = type(local)(**{**vars(local), "settings": {**settings, "data.path": None, "data.blend": blend}})
    assert record.data(blended)["conversations"] == "a/b at v1, weight 3, y.jsonl, weight 1"
    assert record.hub_data_sets(blended) == ["a/b"]
    own = {"data.validation.path": "c/d", "data.validation.split": "test"}
    with_own = type(local)(**{**vars(local), "settings": {**settings, **own}})
    assert record.data(with_own)["validation"] == "c/d (split test)"
    assert "1 to validate" in record.data(with_own)["used"]
    assert record.hub_data_sets(with_own) == ["c/d"]


def test_languages_are_those_of_enough_answers_to_the_same_data(config: PipelineConfig) -> None:
    answers = {"en": 60, "de": 30, "fr": 8, "it": 1, "undecided": 40}
    trained = stage(config, Stage.sft, data="the same")
    assert record.languages(Run(config), trained) == []
    found = DoctorRecord(data={"languages": {"answers": answers}}, needs={}, machine={}, findings=[])
    stage(config, Stage.doctor, found, data="the same")
    assert record.languages(Run(config), trained) == ["de", "en", "fr"]
    assert record.languages(Run(config), stage(config, Stage.qat, data="other")) == []


def test_a_comparison_of_another_export_is_left_out(config: PipelineConfig) -> None:
    export = make_export(config)
    compared(config, export.fingerprint)
    assert record.comparison(Run(config), export) == "| export | 1.2 |"
    compared(config, "another")
    assert record.comparison(Run(config), export) is None


def compared(config: PipelineConfig, measured: str) -> None:
    evaluated = stage(config, Stage.evaluate, EvaluateRecord(reference=None, results={}), parents={"export": measured})

    def work(directory: Path) -> Result:
        (directory / "compare.md").write_text("| export | 1.2 |\n")
        return Result(Kind.report, CompareRecord(rows=1))

    parents = {"evaluate": evaluated.fingerprint}
    build(Run(config), Stage.compare, settings=(), parents=parents, work=work, is_report=True)


@pytest.mark.parametrize(
    ("own", "license"),
    [
        ("---\nlicense: apache-2.0\n---\n# It\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("# Without metadata\n", {}),
        (None, {}),
    ],
)
def test_the_licence_is_that_of_the_base_model_s_card(
    config: PipelineConfig, tmp_path: Path, own: str | None, license: dict[str, str]
) -> None:
    if own is not None:
        (tmp_path / "README.md").write_text(own)
    base = Source(tmp_path, "f")
    assert card.license_of(config.export.card, base) == license
    config.export = ExportConfig(card=CardConfig(license="mit"))
    assert card.license_of(config.export.card, base) == {"license": "mit"}


@pytest.mark.parametrize(
    ("moved", "relation", "told"),
    [
        (0.0, "quantized", "Nothing was trained: the values are the base model's."),
        (0.5, "finetune", "No training is on record: the weights come from a checkpoint that was made elsewhere."),
    ],
)
def test_without_a_record_of_training_the_weights_tell_whether_there_was_one(
    config: PipelineConfig, tmp_path: Path, moved: float, relation: str, told: str
) -> None:
    export = make_export(config, "gguf", {"model.gguf": "weights"}, moved=moved)
    made = ModelCard(card_of(config, export, tmp_path, ["LICENSE"]))
    assert made.data.to_dict() == {
        "base_model": "openai/gpt-oss-20b",
        "base_model_relation": relation,
        "pipeline_tag": "text-generation",
        "tags": ["gpt_oss", "gguf", "mxfp4", "conversational"],
    }
    assert told in made.text and "The files beside README.md and LICENSE are" in made.text
    assert "{{" not in made.text and "None" not in made.text


def test_a_revision_of_the_hub_s_cache_is_told(config: PipelineConfig, tmp_path: Path) -> None:
    export = make_export(config)
    base = tmp_path / "models--openai--gpt-oss-20b" / "snapshots" / "6cee5e81ee83"
    base.mkdir(parents=True)
    assert "revision `6cee5e81ee83`" in card_of(config, export, base, [])


def test_where_an_export_goes_is_no_part_of_what_it_is(config: PipelineConfig) -> None:
    """Settings of the upload do not invalidate an export. All other settings do."""
    from pipeline.stages import export

    every = Run(config).settings(("export",))
    assert every.keys() - Run(config).settings(export._SETTINGS) == {
        *("export.push_to_hub", "export.private", "export.card.base_model", "export.card.license"),
    }
