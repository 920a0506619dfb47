"""verify: prove that an export is right; the report says how far apart anything is, and a wrong export exits with 1."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts, data, losses, models, source
from pipeline.artifacts import Artifact, Kind, Result, write_json
from pipeline.checkpoints import load_tokenizer, read_config
from pipeline.config import PipelineConfig, Stage
from pipeline.errors import CheckFailed, UserError
from pipeline.models import ModelRef
from pipeline.numerics.formats import FORMATS
from pipeline.source import Source
from pipeline.tracking import is_main_process, log_metrics, say

if TYPE_CHECKING:
    from pipeline.proof import Check

_SETTINGS = ("verify",)
_REPORT = "report.json"
_MOST_POSITIONS = 512  # of each sample: the logits of 8 samples of the released vocabulary are 3.3 GB


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/verify. Raises CheckFailed, and leaves the report but no artifact, if something is off."""
    directory = _checkpoint(config)
    reference = _reference(config)
    export, unknown = _export(directory)
    ref = None
    if export is not None:
        ref, unknown = _trained(config, export)
    fingerprint, _ = artifacts.fingerprint_of(directory)
    parents = {"checkpoint": fingerprint, "reference": reference.fingerprint}
    if ref is not None:
        parents["model"] = ref.fingerprint
    return artifacts.build(
        config,
        Stage.verify,
        _SETTINGS,
        parents,
        lambda into: _verify(config, directory, reference, export, ref, unknown, into),
        is_report=True,
    )


def _verify(
    config: PipelineConfig,
    directory: Path,
    reference: Source,
    export: Artifact | None,
    ref: ModelRef | None,
    unknown: str,
    into: Path,
) -> Result:
    from pipeline import proof

    checks = [proof.check_layout(directory, reference.directory)]
    if checks[0].problems:
        unknown = "the layout is wrong"
    else:
        checks.append(proof.check_scales(directory))
        if export is not None:
            checks.append(proof.check_copied(directory, reference.directory, export.details["copied"]))
    if ref is None or export is None or checks[0].problems:
        checks.append(proof.Check("weights and logits against the trained model", skipped=unknown))
    else:
        checks += _against_trained(config, export, ref)
    report = {
        "checkpoint": str(directory),
        "reference": str(reference.directory),
        "trained_model": str(ref.directory) if ref is not None else None,
        "checks": [_record(check) for check in checks],
    }
    write_json(into / _REPORT, report)
    for check in checks:
        log_metrics(into, {"check": check.title, "status": check.status, **check.measured})
        _show(check)
    wrong = [problem for check in checks for problem in check.problems]
    if wrong:
        raise CheckFailed(f"{directory} is not right: {len(wrong)} problems, see {into / _REPORT}. First: {wrong[0]}")
    return Result(Kind.report, details={"checks": {check.title: check.status for check in checks}})


def _against_trained(config: PipelineConfig, export: Artifact, ref: ModelRef) -> list["Check"]:
    from pipeline import proof

    directory = export.directory
    assert export.format is not None and export.scale_rule is not None
    block_format = FORMATS[export.format].with_rule(export.scale_rule)
    tokenizer = load_tokenizer(ref.base)
    validation = data.prepare(config, data.load_rows(config), tokenizer).validation
    batches = losses.batches(
        validation.select(range(min(config.verify.samples, len(validation)))), 1, tokenizer.pad_token_id
    )
    batches = [{key: values[:, :_MOST_POSITIONS] for key, values in batch.items()} for batch in batches]
    trained = proof.TrainedModel(ref, batches, block_format)
    return [
        trained.check_experts(directory),
        trained.check_others(directory),
        trained.check_logits(directory, config.verify.logits_tolerance),
    ]


def _checkpoint(config: PipelineConfig) -> Path:
    if config.verify.checkpoint is None:
        return artifacts.require(config, Stage.export, check_files=False).directory
    directory = Path(config.verify.checkpoint).expanduser().absolute()
    if not directory.is_dir():
        raise UserError(f"verify.checkpoint={config.verify.checkpoint}: no such directory.")
    read_config(directory)
    return directory


def _reference(config: PipelineConfig) -> Source:
    if config.verify.reference is None:
        return source.locate(config)
    model = replace(config.model, path=config.verify.reference, revision=None)
    return source.locate(replace(config, model=model), "verify.reference")


def _export(directory: Path) -> tuple[Artifact | None, str]:
    """What the export stage recorded of a directory, or why that is not known."""
    if not (directory / artifacts.ARTIFACT_FILE).is_file():
        return None, f"{directory} has no {artifacts.ARTIFACT_FILE} that names the model it was made from"
    export = artifacts.load(directory, check_files=False)
    if export.stage != Stage.export.name:
        return None, f"{directory} is a result of stage={export.stage}, not of export"
    return export, ""


def _trained(config: PipelineConfig, export: Artifact) -> tuple[ModelRef | None, str]:
    """The model that the export was made from, or why it is not known."""
    directory = export.directory
    origins = (directory.parent / export.details["exported_from"], Path(export.details["exported_directory"]))
    there = [models.find(config, str(origin), (), "exported_directory") for origin in origins if origin.is_dir()]
    for ref in there:
        if ref.fingerprint == export.parents["model"]:
            return ref, ""
    if there:
        raise UserError(
            f"{directory} was made from an earlier {there[0].name} ({there[0].directory} has changed since)."
            f" Export again: python -m pipeline stage=export recipe={config.recipe} run_dir={config.run_dir}"
            " overwrite=true"
        )
    return None, f"the model that it was made from, {origins[-1]}, is not there any more"


def _record(check: "Check") -> dict[str, Any]:
    return {
        "title": check.title,
        "status": check.status,
        "problems": check.problems,
        "measured": check.measured,
        "skipped": check.skipped,
    }


def _show(check: "Check") -> None:
    figures = ", ".join(f"{name} {value:.6g}" for name, value in check.measured.items())
    say("verify", f"{check.status:<12}{check.title}{f' ({figures})' if figures else ''}")
    if is_main_process():
        for line in [*check.problems, *([check.skipped] if check.skipped else [])]:
            print(f"             {line}")
