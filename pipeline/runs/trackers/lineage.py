"""Describe the inputs and outputs of a stage for trackers: data set, models and reports, with their fingerprints.

A description depends only on the contents. So the stage that makes a model and the stages that use it describe the same
item, and trackers connect them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import ModelConfig, Stage
from pipeline.config.controls import DIRECTORY
from pipeline.config.secrets import without_secrets
from pipeline.runs import controls, exports, parts
from pipeline.runs.artifacts import ARTIFACT_FILE, CONFIG_FILE, MODEL_STAGES, Artifact, Kind, load, read_config
from pipeline.runs.paths import absolute
from pipeline.runs.run import START, Run
from pipeline.runs.trackers.readings import split
from pipeline.runs.trackers.tracker import DATASET, MODEL, MODEL_FILES, REPORT, Item
from pipeline.runs.yaml_files import value_at

_OTHER_NAMES: Mapping[str, tuple[Stage, ...]] = {"model": MODEL_STAGES}
"""Parents of export that are a stage's model under another name."""
_CHECKPOINT = "checkpoint"
"""Name of the parent of verify that is an export."""
_BASES = ("source", "reference")
"""Names of the parent that is the base model, in upcast and export, and in verify."""
_RESULTS = "results"
_NOT_IN_NAMES = re.compile(r"[^-\w.]+", re.ASCII)
_LONGEST_NAME = 100


def inputs(run: Run, parents: Mapping[str, str], data: str | None) -> Iterator[Item]:
    """Yield the inputs of a stage: the data set, the base model, and stages of the run or of its controls.

    Args:
        run: the run.
        parents: fingerprint of each input, keyed by the input's name.
        data: fingerprint of the data set, or None.
    """
    config = run.config
    if data is not None:
        path = config.data.path or "blend"
        facts = {"path": without_secrets(path), "fingerprint": data}
        yield Item(item_name("data", base_name(path)), DATASET, data, facts)
    for name, fingerprint in parents.items():
        if name in _BASES:
            yield _base(config.model, fingerprint)
        elif found := next((each for each in _candidates(run, name) if each.fingerprint == fingerprint), None):
            yield describe(found)


def _candidates(run: Run, name: str) -> Iterator[Artifact]:
    """Yield the artifacts that a parent of this name can be. Other parents, such as prompts, are no artifacts."""
    if name == START and run.config.sft.start is not None:
        yield load(absolute(run.config.sft.start), check_files=False)
    elif name.startswith(f"{DIRECTORY}/"):
        yield from (made.artifact for made in controls.find_made(run) if made.model == name)
    if exports.is_export(name) or name == _CHECKPOINT:
        yield from (each.artifact for each in exports.find_all(run.directory))
        return
    for stage in [Stage[name]] if name in Stage.__members__ else _OTHER_NAMES.get(name, ()):
        directory = run.stage_dir(stage)
        if (directory / ARTIFACT_FILE).is_file():
            yield load(directory, check_files=False)


def describe(artifact: Artifact, files: Mapping[str, Path] | None = None) -> Item:
    """Describe the result of a stage, with some files to store."""
    facts = {
        "stage": artifact.stage,
        "fingerprint": artifact.fingerprint,
        "kind": artifact.kind.name,
        "format": artifact.format,
        "fake_quantized": artifact.fake_quantized,
        "scale_rule": artifact.scale_rule,
        "base_model": without_secrets(artifact.base_model),
        "files": artifact.files,
    }
    kind = REPORT if artifact.kind is Kind.report else MODEL
    name = item_name(_name_of_run(artifact), artifact.stage, *_part_of(artifact))
    return Item(name, kind, artifact.fingerprint, facts, dict(files or {}))


def weights(artifact: Artifact) -> Item:
    """Describe the files of a model, to store all of them."""
    model = describe(artifact)
    files = {name: artifact.directory / name for name in artifact.files}
    return Item(f"{model.name}-files", MODEL_FILES, model.fingerprint, model.description, files)


def final_figures(artifact: Artifact) -> dict[str, float]:
    """Return the numbers of a stage's record, keyed by `<model>/<figure>`. Nested figures are in metrics.jsonl."""
    results = artifact.details.get(_RESULTS)
    models = results if isinstance(results, dict) else {artifact.stage: artifact.details}
    found: dict[str, float] = {}
    for model, figures in models.items():
        top = {name: value for name, value in figures.items() if not isinstance(value, dict)}
        found |= split(top, model)[0]
    return found


def base_name(path: str) -> str:
    """Return the last part of a path or hub id, without the machine's directories."""
    return path.rstrip("/").rpartition("/")[2] or path


def item_name(*parts: str) -> str:
    """Join the parts to a name that all trackers allow."""
    return _NOT_IN_NAMES.sub("-", "-".join(parts))[:_LONGEST_NAME]


def _base(model: ModelConfig, fingerprint: str) -> Item:
    facts: dict[str, Any] = {"path": without_secrets(model.path), "revision": model.revision}
    return Item(item_name("base", base_name(model.path)), MODEL, fingerprint, {**facts, "fingerprint": fingerprint})


def _part_of(artifact: Artifact) -> list[str]:
    """Return the name of the part that an artifact is, or an empty list. Exports to two targets are two items."""
    is_part = artifact.stage in parts.STAGES and artifact.directory.parent.name == artifact.stage
    return [artifact.directory.name] if is_part else []


def _name_of_run(artifact: Artifact) -> str:
    """Return the name of the run that made a stage. A control or a sweep may use a stage of another run."""
    origin = replace(artifact, directory=artifact.directory.resolve())
    made_with = read_config(origin.directory) if (origin.directory / CONFIG_FILE).is_file() else None
    named = (value_at(made_with, key) for key in ("tracking.name", "recipe"))
    return str(next((name for name in named if name), origin.run_directory.name))
