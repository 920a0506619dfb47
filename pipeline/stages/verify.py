"""verify: proves that an export is right.

The report lists every difference. The exit status is 1 if the export is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.gpt_oss import MODEL_TYPE
from pipeline.checkpoints.side_files import ADAPTER_CONFIG
from pipeline.config import PipelineConfig, Stage
from pipeline.config.controls import is_control
from pipeline.data.examples import prepare_examples
from pipeline.data.rows import load_rows
from pipeline.data.tokenizers import load_tokenizer
from pipeline.errors import CheckFailed, UserError, at_most
from pipeline.export import EXPORTERS, recognize
from pipeline.models import losses, references, source
from pipeline.models.foreign_adapters import holds_adapters
from pipeline.models.references import ModelRef
from pipeline.models.source import Source
from pipeline.models.weights import Weights
from pipeline.numerics.formats import FORMATS, BlockFormat
from pipeline.runs import exports, parts
from pipeline.runs.artifacts import (
    ARTIFACT_FILE,
    UNFINISHED_FILE,
    Artifact,
    Contents,
    Kind,
    Result,
    fingerprint_of,
    load,
)
from pipeline.runs.building import build
from pipeline.runs.commands import stage_command
from pipeline.runs.console import say
from pipeline.runs.json_files import write_json
from pipeline.runs.paths import absolute
from pipeline.runs.processes import is_main_process
from pipeline.runs.records import ExportRecord, VerifyRecord
from pipeline.runs.run import Run
from pipeline.runs.tracking import log_metrics

if TYPE_CHECKING:
    from pipeline.verify import Check
    from pipeline.verify.trained import TrainedModel

_SETTINGS = ("verify",)
_REPORT = "report.json"
_MOST_POSITIONS = 512  # per sample; 8 samples then have 3.3 GB of logits with the released vocabulary


def run(config: PipelineConfig) -> Artifact:
    """Make <run_dir>/verify/<target>, or <run_dir>/verify/checkpoint for a checkpoint that is no export of this run.

    Raises:
        CheckFailed: a check found a problem. The report is written, but no artifact.
    """
    here = Run(config) if config.verify.checkpoint is not None else exports.choose_to_verify(Run(config))
    subject = _subject(config, here)
    here = Run(config, exports.part_of(here, subject.directory) or parts.CHECKPOINT)
    parents = {"checkpoint": subject.found.fingerprint, "reference": subject.reference.fingerprint}
    if subject.ref is not None:
        parents["model"] = subject.ref.fingerprint
    return build(
        here,
        Stage.verify,
        settings=_SETTINGS,
        parents=parents,
        work=lambda into: _verify(config, here, subject, into),
        is_report=True,
    )


@dataclass(frozen=True)
class _Subject:
    """The checkpoint to check, and the models to check it against.

    Attributes:
        directory: directory of the checkpoint.
        found: the checkpoint's present files.
        target: name of the checkpoint's layout. EXPORTERS has a row for each name.
        reference: the base model.
        export: the artifact of the export stage, or None.
        ref: the model that the export was made from, or None.
        unknown: the reason why there is no `ref`.
    """

    directory: Path
    found: Contents
    target: str
    reference: Source
    export: Artifact | None
    ref: ModelRef | None
    unknown: str


def _subject(config: PipelineConfig, here: Run) -> _Subject:
    directory = _checkpoint(config, here)
    reference = _reference(config, here)
    export, ref = None, None
    unknown = f"{directory} has no {ARTIFACT_FILE} that names the model it was made from"
    if (directory / ARTIFACT_FILE).is_file():
        export = _export(directory, reference)
        ref, unknown = _trained(here, export)
    target = recognize(directory) if export is None else export.read(ExportRecord).target
    _raise_unless_loadable(config, target)
    return _Subject(directory, fingerprint_of(directory), target, reference, export, ref, unknown)


def _raise_unless_loadable(config: PipelineConfig, target: str) -> None:
    from pipeline.verify import engines

    engines.raise_unless_loadable([each.name for each in config.verify.engines], target, vars(config.verify.python))


def _verify(config: PipelineConfig, here: Run, subject: _Subject, into: Path) -> Result:
    checks = _checks(config, here, subject)
    gaps = [check.gap for check in checks if check.gap]
    report = {
        "checkpoint": str(subject.directory),
        "target": subject.target,
        "reference": str(subject.reference.directory),
        "trained_model": str(subject.ref.directory) if subject.ref is not None else None,
        "checks": [_record(check) for check in checks],
        "not_checked": gaps,
    }
    write_json(into / _REPORT, report)
    for check in checks:
        log_metrics(into, {"check": check.title, "status": check.status, **check.measured})
        _show(check)
    wrong = [problem for check in checks for problem in check.problems]
    if wrong:
        parts.show(into)
        count = "1 problem" if len(wrong) == 1 else f"{len(wrong)} problems"
        raise CheckFailed(f"{subject.directory} is not right: {count}, see {into / _REPORT}. First: {wrong[0]}")
    say("verify", "nothing wrong was found. Not checked:")
    _list(gaps)
    statuses = {check.title: check.status for check in checks}
    return Result(Kind.report, VerifyRecord(checks=statuses, not_checked=gaps))


def _checks(config: PipelineConfig, here: Run, subject: _Subject) -> list["Check"]:
    """Run every possible check.

    Weights are checked if they can be read. Logits are checked if the configuration is also right.
    """
    from pipeline import verify

    directory, base, export = subject.directory, subject.reference.directory, subject.export
    copied = None if export is None else export.read(ExportRecord).copied
    checks = verify.check_against_base(directory, subject.target, base, copied, _own_files(subject))
    are_comparable, are_configured = (check.status == "ok" for check in checks[:2])
    if export is not None:
        checks.append(verify.check_unchanged(export, subject.found))
    if subject.ref is not None:
        checks.append(verify.check_trained_files(subject.ref.directory))
        are_comparable = are_comparable and not checks[-1].problems
    if not are_comparable:
        return checks
    weights = _weight_checks(config, here, subject, are_configured)
    return [*checks, *weights, *_engine_checks(config, here, subject)]


def _own_files(subject: _Subject) -> dict[str, Path | None]:
    """Return the side files that the exported model has in place of the base model's. None: the file is gone."""
    names = [] if subject.export is None else subject.export.read(ExportRecord).own_files or []
    files = {name: None if subject.ref is None else subject.ref.directory / name for name in names}
    return {name: file if file is not None and file.is_file() else None for name, file in files.items()}


def _weight_checks(config: PipelineConfig, here: Run, subject: _Subject, are_configured: bool) -> list["Check"]:
    """Check the weights and the logits against the model that the export was made from."""
    from pipeline import verify

    export = subject.export
    if export is None or subject.ref is None:
        skipped = f"{subject.unknown}. Comparing with the base model finds gross errors, but not single wrong values"
        return [verify.Check("weights and logits against the trained model", skipped=skipped)]
    trained = _trained_model(config, here, export, subject.ref)
    view = verify.view_export(subject.directory, subject.target, subject.reference.directory)
    checks = [trained.check_experts(view), trained.check_others(view)]
    checks += _merge_checks(subject, subject.ref)
    if _format_of(export).quantizes_activations:
        checks.append(trained.check_inputs(view, EXPORTERS[subject.target].load_optional))
    if not are_configured:
        return [*checks, verify.Check("logits", skipped="the files are not the base model's")]
    if export.kind is Kind.foreign:
        return [*checks, verify.Check("logits", skipped=f"transformers does not load {subject.target}")]
    return [*checks, trained.check_logits(subject.directory, config.verify.logits_tolerance)]


def _merge_checks(subject: _Subject, ref: ModelRef) -> list["Check"]:
    """Check the merge of another program's adapters: those that were exported, or those that were the run's SFT."""
    from pipeline.verify.adapters import check_foreign_sft, check_merge

    if ref.is_foreign:
        return [check_merge(Weights(ref))]
    made = load(ref.directory, check_files=False) if (ref.directory / ARTIFACT_FILE).is_file() else None
    if made is not None and made.stage == Stage.qat.name:
        quantized, mark = made.directory.with_name(Stage.quantize.name), made.parents[Stage.quantize.name]
        made = load(quantized, check_files=False) if (quantized / ARTIFACT_FILE).is_file() else None
        made = made if made is not None and made.fingerprint == mark else None
    if made is None or made.stage != Stage.quantize.name:
        return []
    found = check_foreign_sft(made, subject.reference.fingerprint, subject.reference.directory)
    return [] if found is None else [found]


def _engine_checks(config: PipelineConfig, here: Run, subject: _Subject) -> list["Check"]:
    """Check the export in each engine of verify.engines."""
    from pipeline.verify import Check, engines

    asked = [each.name for each in config.verify.engines]
    checks = []
    if asked:
        dtype = getattr(torch, config.model.dtype.name)
        prompts = engines.prompts(_examples(config, here, subject.reference.directory))
        trial = engines.Trial(subject.directory, subject.target, prompts, dtype, config.verify.engine_seconds)
        expected = engines.expectation(subject.reference.directory, _values(subject), trial)
        pythons = vars(config.verify.python)
        checks = [engines.check_engine(name, pythons[name], trial, expected) for name in asked]
    others = [name for name in engines.engines_for(subject.target) if name not in asked]
    return [*checks, Check("engines", skipped=f"not in verify.engines: {', '.join(others)}")] if others else checks


def _values(subject: _Subject) -> Callable[[str], torch.Tensor]:
    """Return the weights that engines should compute with.

    These are the trained weights if they are known. Otherwise, they are the decoded weights of the export.
    """
    from pipeline.verify import engines, view_export

    if subject.export is None or subject.ref is None:
        return view_export(subject.directory, subject.target, subject.reference.directory).plain_values
    ref = replace(subject.ref, block_format=_format_of(subject.export))
    return engines.values_of_training(Weights(ref))


def _examples(config: PipelineConfig, here: Run, base: Path) -> Dataset:
    """Return the first examples of the validation set, tokenized."""
    rows = load_rows(here, config.data)
    validation = prepare_examples(here, config.data, rows, load_tokenizer(base)).validation
    return validation.select(range(min(config.verify.samples, len(validation))))


def _trained_model(config: PipelineConfig, here: Run, export: Artifact, ref: ModelRef) -> "TrainedModel":
    from pipeline.verify.trained import TrainedModel  # imports ModelOpt and PEFT, so only if there is work

    batches = losses.batches(_examples(config, here, ref.base), 1, load_tokenizer(ref.base).pad_token_id)
    batches = [{key: values[:, :_MOST_POSITIONS] for key, values in batch.items()} for batch in batches]
    return TrainedModel(ref, batches, _format_of(export))


def _format_of(export: Artifact) -> BlockFormat:
    assert export.format is not None and export.scale_rule is not None
    return FORMATS[export.format].with_rule(export.scale_rule)


def _checkpoint(config: PipelineConfig, here: Run) -> Path:
    """Return the directory to check.

    Raises:
        UserError: the directory is missing, unfinished, or cannot be an export of gpt-oss.
    """
    if config.verify.checkpoint is None:
        return exports.directory_to_verify(here)
    given = f"verify.checkpoint={config.verify.checkpoint}"
    directory = absolute(config.verify.checkpoint)
    if not directory.is_dir():
        raise UserError(f"{given}: no such directory.")
    if (directory / ARTIFACT_FILE).is_file():
        return parts.resolve(directory)
    if (directory / UNFINISHED_FILE).is_file():
        raise UserError(f"{given}: unfinished. Repeat the command that was writing it, then verify.")
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file():
        exported = stage_command(Stage.export, f"model.path={config.model.path}", f"export.source={directory}")
        raise UserError(f"{given}: holds adapters, not a whole model. Export them, and verify the export: {exported}")
    if not any(each for kind in ("*.safetensors", "*.gguf") for each in directory.glob(kind)):
        raise UserError(f"{given}: holds no weights (*.safetensors, *.gguf), so it is not an exported checkpoint.")
    if (found := _model_type(directory)) not in (None, MODEL_TYPE):
        raise UserError(f"{given}: model_type is {found!r}, not {MODEL_TYPE!r}. This is not a gpt-oss checkpoint.")
    return directory


def _export_command(model: Path) -> str:
    return stage_command(Stage.export, f"export.source={model}")


def _model_type(directory: Path) -> object:
    """Return `model_type` of config.json, or None if it cannot be read. A check reports an unreadable file."""
    try:
        return read_config(directory).get("model_type")
    except UserError:
        return None


def _reference(config: PipelineConfig, here: Run) -> Source:
    if config.verify.reference is None:
        return source.locate(here, config.model)
    model = replace(config.model, path=config.verify.reference, revision=None)
    return source.locate(here, model, "verify.reference")


def _export(directory: Path, reference: Source) -> Artifact:
    """Return the artifact that the export stage wrote into a directory.

    Raises:
        UserError: another stage wrote the artifact, or the export was made from another base model.
    """
    export = load(directory, check_files=False)
    if export.stage != Stage.export.name:
        raise UserError(
            f"verify.checkpoint={directory}: a result of stage={export.stage}, not of stage=export."
            f" Verify its export: {_export_command(directory)}"
        )
    if export.parents["source"] != reference.fingerprint:
        raise UserError(
            f"{directory} was made from the base model {export.base_model['path']}, which is not the one in"
            f" {reference.directory}. Set verify.reference to the base model that it was made from."
        )
    return export


def _trained(here: Run, export: Artifact) -> tuple[ModelRef | None, str]:
    """Return the model that the export was made from. If it is unknown, return None and the reason."""
    directory, record = export.directory, export.read(ExportRecord)
    name, own, former = (
        record.exported_from,
        export.run_directory / record.exported_from,
        Path(record.exported_directory),
    )
    is_of_run = name in Stage.__members__ or is_control(name)
    there = {
        origin: references.find(here, str(origin), (), "exported_directory")
        for origin in (own, former)
        if (origin / ARTIFACT_FILE).is_file() or (origin.is_dir() and (not is_of_run or holds_adapters(origin)))
    }
    for ref in there.values():
        if ref.fingerprint == export.parents["model"]:
            return ref, ""
    # The run may have been moved since, and another run may be at its former place.
    if (earlier := there.get(own if is_of_run and not holds_adapters(former) else former)) is not None:
        raise UserError(
            f"{directory} was made from an earlier {earlier.name} ({earlier.directory} has changed since)."
            f" Export again: {here.rebuild_command(export)}"
        )
    return None, f"the model that it was made from, {former}, no longer exists"


def _record(check: "Check") -> dict[str, object]:
    return {
        "title": check.title,
        "status": check.status,
        "problems": check.problems,
        "measured": check.measured,
        "tensors": check.tensors,
        "stated": check.stated,
        "skipped": check.skipped,
    }


def _show(check: "Check") -> None:
    figures = ", ".join(f"{name} {_figure(value)}" for name, value in check.measured.items())
    say("verify", f"{check.status:<12}{check.title}{f' ({figures})' if figures else ''}")
    _list([*at_most(check.problems), *([check.skipped] if check.skipped else [])])


def _figure(value: float | str | None) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _list(lines: list[str]) -> None:
    if is_main_process():
        for line in lines:
            print(f"             {line}")
