"""The model card: README.md of a published export, with the metadata that the Hub reads."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from pipeline import __version__
from pipeline.config import PipelineConfig, Stage
from pipeline.config.hub_ids import is_hub_id
from pipeline.config.targets import TARGETS
from pipeline.models.source import Source
from pipeline.publish import record
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact

FILE = "README.md"

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def text(config: PipelineConfig, export: Artifact, proof: Artifact, base: Source, added: list[str]) -> str:
    """The whole card.

    Args:
        config: the resolved configuration.
        export: that it describes.
        proof: what `verify` left of it.
        base: the base model.
        added: names of the files that are there beside the export's.
    """
    made = json.loads((export.directory / ARTIFACT_FILE).read_text(encoding="utf-8"))
    trained = record.trainings(record.lineage(export))
    target, repository = TARGETS[export.details["target"]], config.export.push_to_hub
    card = ModelCard.from_template(
        _metadata(config, export, trained, base),
        template_path=str(_TEMPLATE),
        title=repository.rpartition("/")[2] if repository else config.recipe,
        layout=target.title,
        usage=target.usage.format(model=repository or "<its repository or directory>"),
        base_name=base_name(config) or Path(config.model.path).name,
        base_revision=_revision(config, base),
        base=base,
        stages=[record.training(each) for each in trained],
        data=record.data(trained[-1]) if trained else {},
        export=export,
        survival=record.survival(export),
        program=f"gpt-oss-qat {__version__}" + (f", commit {made['git_commit']}" if made["git_commit"] else ""),
        libraries=", ".join(f"{name} {version}" for name, version in made["libraries"].items()),
        added=" and ".join([FILE, *added]),
        checks={record.without_directories(title): status for title, status in proof.details["checks"].items()},
        gaps=[record.without_directories(gap) for gap in proof.details["not_checked"]],
        comparison=record.comparison(config, export),
    )
    return str(card)


def base_name(config: PipelineConfig) -> str | None:
    """The base model's id on the Hub, or None where it is not known."""
    return config.export.card.base_model or (config.model.path if is_hub_id(config.model.path) else None)


def license_of(config: PipelineConfig, base: Source) -> dict[str, Any]:
    """`license`, and what goes with it, as set, or as in the base model's own card; empty where that says nothing."""
    if config.export.card.license is not None:
        return {"license": config.export.card.license}
    path = base.directory / FILE
    known = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    return {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}


def _metadata(config: PipelineConfig, export: Artifact, trained: list[Artifact], base: Source) -> ModelCardData:
    target, name = TARGETS[export.details["target"]], base_name(config)
    is_tuned = bool(trained or export.details["moved_weights"])  # trained here or, where there is no record, elsewhere
    is_qat = any(each.stage == Stage.qat.name for each in trained)
    tags = ["gpt_oss", *target.tags, *(["quantization-aware-training"] if is_qat else []), "conversational"]
    return ModelCardData(
        base_model=name,
        base_model_relation=("finetune" if is_tuned else "quantized") if name else None,
        library_name=target.library,
        pipeline_tag="text-generation",
        tags=tags,
        datasets=(record.hub_data_sets(trained[-1]) if trained else None) or None,
        language=(record.languages(config, trained[-1]) if trained else None) or None,
        **license_of(config, base),
    )


def _revision(config: PipelineConfig, base: Source) -> str | None:
    """The base model's commit, by which the Hub's cache calls its directories, or what was asked for."""
    is_cached = base.directory.parent.name == "snapshots"
    return base.directory.name if is_cached else config.model.revision
