"""Find the models of a run on disk, and describe how to load them.

A stage writes a full checkpoint, or adapters for the checkpoint of an earlier stage. Both kinds can have fake
quantizers. A `ModelRef` says what a directory holds.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.checkpoints.config_json import CONFIG, is_quantized, read_config
from pipeline.checkpoints.reading import Checkpoint
from pipeline.checkpoints.recognition import describe_missing
from pipeline.checkpoints.released import raise_if_unfit
from pipeline.config import FormatConfig, Stage
from pipeline.config.controls import is_control
from pipeline.config.secrets import without_secrets
from pipeline.errors import UserError
from pipeline.models import foreign_adapters
from pipeline.models.foreign_adapters import describe_other_base, read_adapter_config
from pipeline.models.source import Source, locate, sampled_fingerprint
from pipeline.numerics.formats import FORMATS, BlockFormat
from pipeline.runs import controls, exports, parts, passing_over
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact, Kind, load
from pipeline.runs.console import warn
from pipeline.runs.paths import absolute
from pipeline.runs.records import ModelRecord
from pipeline.runs.run import Run
from pipeline.runs.up_to_date import say_if_needed


@dataclass(frozen=True)
class ModelRef:
    """A model on disk.

    Attributes:
        name: name of the stage, or path of the directory as the user gave it.
        directory: directory of the stage, or the directory that the user gave.
        base: directory of the full checkpoint. It is `directory` itself if there are no adapters.
        adapter: whether `directory` has adapters.
        block_format: format and scale rule of the fake quantizers, or None if the model has none.
        fingerprint: fingerprint of the artifact, or `sampled_fingerprint` if the directory is not an artifact.
        dtype: type of the weights in training. Adapters are merged in this type.
    """

    name: str
    directory: Path
    base: Path
    adapter: bool = False
    block_format: BlockFormat | None = None
    fingerprint: str = ""
    dtype: torch.dtype = torch.bfloat16

    @property
    def is_foreign(self) -> bool:
        """Whether another program saved the adapters."""
        return self.adapter and not (self.directory / ARTIFACT_FILE).is_file()

    @property
    def is_packed(self) -> bool:
        """Whether the experts of the full checkpoint are packed (MXFP4)."""
        return is_quantized(read_config(self.base))


def of_artifact(artifact: Artifact, name: str | None = None) -> ModelRef:
    """Describe the model that a stage wrote. `name` is its name in reports, by default the stage.

    Raises:
        UserError: the artifact is a report, or an export that transformers cannot load.
    """
    if artifact.kind is Kind.report:
        raise UserError(f"{artifact.directory} is the report of stage={artifact.stage}, not a model.")
    if artifact.kind is Kind.foreign:
        raise UserError(
            f"{artifact.directory} was exported in a layout that only inference engines load. Name another model of the"
            " run, or export with export.target=mxfp4."
        )
    is_export = artifact.stage == Stage.export.name
    record = ModelRecord(dtype="bfloat16") if is_export else artifact.read(ModelRecord)
    return ModelRef(
        name or artifact.stage,
        artifact.directory,
        artifact.base_directory,
        artifact.kind is Kind.adapter,
        format_of(artifact),
        artifact.fingerprint,
        getattr(torch, record.dtype),
    )


def format_of(artifact: Artifact) -> BlockFormat | None:
    """Return the format and scale rule of the model's fake quantizers, or None if it has none."""
    if artifact.fake_quantized is None:
        return None
    assert artifact.scale_rule is not None
    return FORMATS[artifact.fake_quantized].with_rule(artifact.scale_rule)


def configured_format(settings: FormatConfig) -> BlockFormat:
    """Return the format and scale rule in the configuration."""
    return FORMATS[settings.name.name].with_rule(settings.scale_rule.name)


def find(run: Run, source: str | None, among: tuple[Stage, ...], key: str) -> ModelRef:
    """Find the model that `source` names.

    `source` is a stage of this run, an export (`export/<target>`), a stage of a control (`Control.model`), or a
    directory. If `source` is None, the newest complete stage in `among` is used. Messages use `key` as the name of the
    setting.

    Raises:
        UserError: the model is missing or unfinished, the directory is not a model, or `source` is None and a stage
            after the newest complete one is unfinished, or the model of the newest export.
    """
    if source is None:
        newest = next((stage for stage in reversed(among) if is_loadable(run, stage)), among[0])
        passing_over.raise_if_passed_over(run, newest, among, key)
        ref = stage_ref(run, newest)
        if newest is Stage.export:
            passing_over.raise_if_export_is_older(run, load(ref.directory), f"{key}={newest.name}")
        say_if_needed(run.stage.name, f"{key}: {ref.name}, the newest complete stage")
        return ref
    if (problem := source_problem(run, source, among, key)) is not None:
        raise UserError(problem)
    if is_own_name(source):  # a directory with such a name must be given as ./<name>
        first, _, target = source.partition("/")
        return export_ref(run, target) if target else stage_ref(run, Stage[first])
    directory = run.directory / source if is_control(source) else parts.resolve(absolute(source))
    if not directory.is_dir():
        raise UserError(f"{key}={source}: no control of {run.directory} has this model.")
    if foreign_adapters.holds_adapters(directory):
        base = locate(run, run.config.model)
        warn_of_other_base(run, directory, base, f"{key}={source}")
        return replace(on_base(directory, base), name=source)
    ref = in_directory(directory, controls.remedy_of(directory) if is_control(source) else None)
    if ref.name == exports.NAME and (name := exports.name_of(run, directory)) is not None:
        return replace(ref, name=name)
    is_own = (directory / ARTIFACT_FILE).is_file() and directory == run.stage_dir(ref.name)
    return ref if is_own else replace(ref, name=source)


def in_directory(directory: Path, remedy: str | None = None) -> ModelRef:
    """Describe the model in a directory, which a stage or another program wrote. Its name is the stage's, or the path.

    Args:
        directory: absolute path of the directory.
        remedy: advice at the end of a message about a damaged artifact, or None for the usual one.

    Raises:
        UserError: the artifact is damaged, a report, or not loadable; or the directory is no gpt-oss checkpoint.
    """
    if (directory / ARTIFACT_FILE).is_file():
        return of_artifact(load(directory, remedy=remedy))
    Checkpoint(directory).close()
    raise_if_unfit(directory)
    return ModelRef(str(directory), directory, directory, fingerprint=sampled_fingerprint(directory))


def on_base(directory: Path, base: Source) -> ModelRef:
    """Describe adapters that another program saved with PEFT. They are merged on `base`, in bfloat16.

    Raises:
        UserError: this program cannot merge the adapters exactly.
    """
    read_adapter_config(directory)
    mark = foreign_adapters.fingerprint(directory, base.fingerprint)
    return ModelRef(str(directory), directory, base.directory, adapter=True, fingerprint=mark)


def warn_of_other_base(run: Run, directory: Path, base: Source, asked: str) -> None:
    """Warn if adapters of another program name another base than they are merged on. `asked` is the user's setting."""
    if (warning := describe_other_base(read_adapter_config(directory), base, run.config.model.path)) is not None:
        warn(run.stage.name, f"{asked}: {warning}.")


def adapters_directory(source: str, key: str) -> Path:
    """Return the directory of adapters that another program saved. `key` is the setting with the value `source`.

    Raises:
        UserError: the directory holds no adapters, or this program cannot merge them exactly.
    """
    directory = absolute(source)
    if (problem := foreign_adapters.describe_other_contents(directory)) is not None:
        raise UserError(f"{key}={source}: {problem}")
    read_adapter_config(directory)
    return directory


def _foreign_sft(run: Run, source: str) -> ModelRef:
    """Describe the adapters in quantize.source, which are this run's SFT. They are merged on the run's upcast.

    Without an upcast, they are merged on the source, which has the same values.
    """
    key, model = "quantize.source", run.config.model
    directory = adapters_directory(source, key)
    if run.is_complete(Stage.upcast):
        upcast = require_upcast(run, model.path)
        base = Source(upcast.directory, upcast.parents["source"])
    else:
        base = locate(run, model)
    return replace(on_base(directory, base), name=Stage.sft.name)


def relative_base(base: Path, directory: Path) -> str:
    """Return the path of a base model as adapters in `directory` record it. Runs can be moved with it."""
    return os.path.relpath(base, directory)


def source_problem(run: Run, source: str, among: tuple[Stage, ...], key: str) -> str | None:
    """Return a message if `source` can never name a model, else None. A stage of this run may be made later."""
    if is_own_name(source):
        stages = ", ".join(stage.name for stage in among)
        is_possible = Stage[source.partition("/")[0]] in among
        return None if is_possible else f"{key}={source}: must be one of {stages}, or a directory."
    directory = absolute(source)
    if is_control(source) or directory.is_dir():
        return None
    if directory.is_file():
        return f"{key}={source}: {describe_missing(source)}"
    forms = f", an export ({exports.NAME}/<target>)" if Stage.export in among else ""
    return f"{key}={source}: neither a stage ({', '.join(s.name for s in among)}){forms} nor a directory."


def is_own_name(source: str) -> bool:
    """Return whether a source means a model of this run: a stage, or export/<target>."""
    return source in Stage.__members__ or exports.is_export(source)


def is_loadable(run: Run, stage: Stage) -> bool:
    """Return whether a stage of this run is complete and transformers can load its model."""
    if stage is Stage.export:
        return _loadable_export(run) is not None
    if stage is Stage.sft and (adapters := run.config.quantize.adapters) is not None:
        return foreign_adapters.holds_adapters(absolute(adapters))
    return run.is_complete(stage) and load(run.stage_dir(stage), check_files=False).kind is not Kind.foreign


def stage_ref(run: Run, stage: Stage) -> ModelRef:
    """Return the model of a complete stage of this run. Adapters in quantize.source are the model of `sft`.

    Raises:
        UserError: the stage is stale or damaged, or the adapters are missing or cannot be merged; or it is `export`,
            export.target is null, and an export that transformers can load is unfinished.
    """
    if stage is Stage.sft and (adapters := run.config.quantize.adapters) is not None:
        return _foreign_sft(run, adapters)
    if stage is not Stage.export:
        return of_artifact(run.require(stage))
    target = _loadable_export(run)
    if target is not None:
        passing_over.raise_if_export_is_passed_over(run, target, models_only=True)
    return export_ref(run, target)


def ref_unless_stale(run: Run, stage: Stage) -> ModelRef | None:
    """Return the model of a stage that `is_loadable`, or None if it is stale."""
    if stage is Stage.sft and run.config.quantize.adapters is not None:
        return stage_ref(run, stage)
    artifact = load(run.stage_dir(stage))
    return of_artifact(artifact) if run.staleness(artifact) is None else None


def export_ref(run: Run, target: str | None) -> ModelRef:
    """Return the model of the export in the layout `target`, or of the one that export.target names."""
    artifact = Run(run.config, target).require(Stage.export)
    return of_artifact(artifact, exports.name_of(run, artifact.directory))


def export_refs(run: Run) -> list[ModelRef]:
    """Return the models of all exports that transformers can load, except stale ones (`exports.find_stale`)."""
    there, stale = exports.by_name(run.directory).values(), exports.find_stale(run)
    return [export_ref(run, export.target) for export in there if export.is_loadable and export.target not in stale]


def _loadable_export(run: Run) -> str | None:
    """Return the layout of the export that export.target names, or of the last one, if transformers can load it.

    Otherwise, another export takes its place.
    """
    there = [export.target for export in exports.find_all(run.directory) if export.is_loadable]
    if run.part in there:
        return run.part
    return there[0] if there else None


def _is_source_of(directory: Path, upcast: Artifact) -> bool:
    """Return whether a directory has the contents that an upcast was made from. Its path may be another one."""
    return (directory / CONFIG).is_file() and sampled_fingerprint(directory) == upcast.parents["source"]


def require_upcast(run: Run, model_path: str) -> Artifact:
    """Return the artifact of this run's upcast.

    Raises:
        UserError: the upcast is missing or unfinished, or was made from another model.
    """
    upcast = run.require(Stage.upcast)
    is_same = upcast.settings["model.path"] == without_secrets(model_path)  # recorded settings have no secrets
    if not is_same and not _is_source_of(Path(model_path).expanduser(), upcast):
        raise UserError(
            f"model.path={model_path}, but {upcast.directory} was made from {upcast.settings['model.path']}."
            " Set another run_dir, or give the model.path that this run began with."
        )
    return upcast
