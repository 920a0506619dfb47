"""publish: puts the proven export and its model card into one directory, and uploads it to the Hub if asked to."""

from pathlib import Path

from pipeline.checkpoints.side_files import link_or_copy, side_files
from pipeline.config import ModelConfig, PipelineConfig, Stage
from pipeline.errors import UserError
from pipeline.models import source
from pipeline.models.source import Source
from pipeline.publish import hub
from pipeline.publish.record import Proven, siblings
from pipeline.runs import exports, passing_over
from pipeline.runs.artifacts import Artifact, Kind, Result, fingerprint_of
from pipeline.runs.building import build
from pipeline.runs.console import say, warn
from pipeline.runs.processes import is_main_process
from pipeline.runs.records import ExportRecord, PublishRecord
from pipeline.runs.run import Run

MODEL = "model"
"""Part of the stage's directory that is uploaded. The stage's records are outside, because they have local paths."""

_SETTINGS = ("export.push_to_hub", "export.card", "recipe", "model.path", "model.revision")
_ALSO_TOLD = (Stage.doctor, Stage.compare)
_LEGAL = ("LICENSE", "USAGE_POLICY", "NOTICE")


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/publish/<target>. If export.push_to_hub is set, upload the folder `model` in it.

    Raises:
        UserError: the export is unfinished or not proven, a later model has begun since, the export has changed since
            `verify`, the base model has changed since `export`, or the upload fails.
    """
    here = exports.choose(Run(config))
    export = here.require(Stage.export)
    passing_over.raise_if_export_is_older(here, export)
    proof = exports.find_proof(here, export)
    if proof is None:
        raise UserError(f"{exports.missing_proof(here, export)}. Only proven exports are published.")
    hub.check(config.export)
    base = _base(here, config.model, export)
    parents = {"export": export.fingerprint, "verify": proof.fingerprint}
    told = [stage for stage in _ALSO_TOLD if here.is_complete(stage)]
    parents |= {stage.name: here.require(stage).fingerprint for stage in told}
    for other in siblings(here, export):
        parents[f"export/{other.target}"] = other.artifact.fingerprint
        parents |= {f"verify/{other.target}": other.proof.fingerprint} if other.proof else {}
    artifact = build(
        here,
        Stage.publish,
        settings=_SETTINGS,
        parents=parents,
        work=lambda into: _publish(config, here, Proven(export, proof, base), into),
        is_report=True,
    )
    if is_main_process():
        _offer(here, config, artifact)
    return artifact


def _base(here: Run, model: ModelConfig, export: Artifact) -> Source:
    base = source.locate(here, model)
    if base.fingerprint != export.parents["source"]:
        raise UserError(
            f"model.path={model.path}: is not the base model of {export.directory} ({export.base_model['path']}), or"
            " has changed since the export. Export again, or set model.path."
        )
    return base


def _publish(config: PipelineConfig, here: Run, proven: Proven, into: Path) -> Result:
    from pipeline.publish import card

    directory, base = into / MODEL, proven.base
    _link(here, proven.export, directory)
    added = [name for name in side_files(base.directory) if name.startswith(_LEGAL) and not (directory / name).exists()]
    for name in added:
        link_or_copy(base.directory / name, directory / name)
    (directory / card.FILE).unlink(missing_ok=True)  # otherwise the card would overwrite the linked file of the export
    text = card.write_text(here, config.model, config.export, proven=proven, added=added)
    (directory / card.FILE).write_text(text, encoding="utf-8")
    _tell_of_gaps(config, base)
    return Result(Kind.report, PublishRecord(files=len(list(directory.iterdir()))), proven.export.format)


def _link(here: Run, export: Artifact, directory: Path) -> None:
    """Link the export's files into another directory, and check that they are the verified ones."""
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    for name in export.files:
        link_or_copy(export.directory / name, directory / name)
    if fingerprint_of(directory).fingerprint != export.fingerprint:
        target = f"export.target={export.read(ExportRecord).target}"
        raise UserError(
            f"{export.directory}: its files have changed since they were exported and verified. Export again:"
            f" {here.rebuild_command(export)}, then verify:"
            f" {here.command(Stage.verify, target)}"
        )


def _tell_of_gaps(config: PipelineConfig, base: Source) -> None:
    from pipeline.publish import card

    if card.base_name(config.model, config.export.card) is None:
        warn(
            "publish",
            "the card names no base model, because model.path is not a hub id. Set export.card.base_model=<hub id>.",
        )
    if not card.license_of(config.export.card, base):
        warn(
            "publish",
            "the card has no licence, because the base model's card has none. Set export.card.license=<as on the Hub>.",
        )


def _offer(here: Run, config: PipelineConfig, artifact: Artifact) -> None:
    directory = artifact.directory / MODEL
    if config.export.push_to_hub is None:
        say("publish", f"to upload it: hf upload <name/model> {directory} . --private")
        return
    if fingerprint_of(artifact.directory).fingerprint != artifact.fingerprint:
        again = here.command(Stage.publish, "overwrite=true")
        raise UserError(f"{directory}: a file has changed since it was made. Make it again: {again}")
    say("publish", f"uploaded: {hub.push(config.export, directory)}")
