"""Write the model card of a published export, as README.md. Its header holds the metadata that the Hub reads."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline import __version__
from pipeline.config import CardConfig, ExportConfig, ModelConfig, Stage
from pipeline.config.hub_ids import is_hub_id
from pipeline.config.targets import TARGETS
from pipeline.models.source import Source
from pipeline.publish import record
from pipeline.publish.record import Proven
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact
from pipeline.runs.records import ExportRecord, VerifyRecord
from pipeline.runs.run import Run

FILE = "README.md"

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def write_text(run: Run, model: ModelConfig, settings: ExportConfig, *, proven: Proven, added: list[str]) -> str:
    """Write the whole card.

    Args:
        run: the run that made the export.
        model: settings of the base model.
        settings: settings of the export.
        proven: the export, the result of `verify` and the base model.
        added: names of files of the base model, such as its license. They are published with the export.
    """
    export, base = proven.export, proven.base
    exported, verified = export.read(ExportRecord), proven.proof.read(VerifyRecord)
    lineage = record.lineage(export)
    trained = record.trainings(lineage)
    target, repository = TARGETS[exported.target], settings.push_to_hub
    card = ModelCard.from_template(
        _metadata(run, base_name(model, settings.card), settings.card, proven, trained),
        template_path=str(_TEMPLATE),
        title=repository.rpartition("/")[2] if repository else run.recipe,
        layout=target.title,
        usage=target.usage.format(model=repository or "<its repository or directory>"),
        base_name=base_name(model, settings.card) or Path(model.path).name,
        base_revision=_revision(model, base),
        base=base,
        stages=[*record.foreign_training(lineage), *(record.training(each) for each in trained)],
        data=record.data(trained[-1]) if trained else {},
        export=export,
        moved_weights=exported.moved_weights,
        survival=record.survival(exported),
        **_made_with(export),
        added=" and ".join([FILE, *added]),
        checks={record.without_directories(title): status for title, status in verified.checks.items()},
        gaps=[record.without_directories(gap) for gap in verified.not_checked],
        others=record.layouts(record.siblings(run, export)),
        comparison=record.comparison(run, export),
    )
    return str(card)


def base_name(model: ModelConfig, card: CardConfig) -> str | None:
    """Return the base model's id on the Hub, or None if it is unknown."""
    return card.base_model or (model.path if is_hub_id(model.path) else None)


def license_of(card: CardConfig, base: Source) -> dict[str, Any]:
    """Return the configured license. If there is none, return the license fields of the base model's card."""
    if card.license is not None:
        return {"license": card.license}
    path = base.directory / FILE
    known = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    return {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}


def _metadata(run: Run, name: str | None, card: CardConfig, proven: Proven, trained: list[Artifact]) -> ModelCardData:
    exported = proven.export.read(ExportRecord)
    target = TARGETS[exported.target]
    is_tuned = bool(trained or exported.moved_weights)  # weights that differ were trained, even if no record says so
    is_qat = any(each.stage == Stage.qat.name for each in trained)
    tags = ["gpt_oss", *target.tags, *(["quantization-aware-training"] if is_qat else []), "conversational"]
    return ModelCardData(
        base_model=name,
        base_model_relation=("finetune" if is_tuned else "quantized") if name else None,
        library_name=target.library,
        pipeline_tag="text-generation",
        tags=tags,
        datasets=(record.hub_data_sets(trained[-1]) if trained else None) or None,
        language=(record.languages(run, trained[-1]) if trained else None) or None,
        **license_of(card, proven.base),
    )


def _made_with(export: Artifact) -> dict[str, str]:
    """Return the versions of the program and of the libraries that made the export."""
    made = json.loads((export.directory / ARTIFACT_FILE).read_text(encoding="utf-8"))
    return {
        "program": f"gpt-oss-qat {__version__}" + (f", commit {made['git_commit']}" if made["git_commit"] else ""),
        "libraries": ", ".join(f"{name} {version}" for name, version in made["libraries"].items()),
    }


def _revision(model: ModelConfig, base: Source) -> str | None:
    """Return the base model's commit if the Hub's cache has the model. Otherwise, return the configured revision.

    In the cache, a model's directory is named after the commit.
    """
    is_cached = base.directory.parent.name == "snapshots"
    return base.directory.name if is_cached else model.revision
