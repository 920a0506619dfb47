"""Describe an export for its model card, from the records of its run. Paths and hosts are left out."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Stage
from pipeline.config.hub_ids import is_hub_id
from pipeline.config.targets import TARGETS
from pipeline.models.source import Source
from pipeline.runs import artifacts, exports
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact
from pipeline.runs.exports import Export
from pipeline.runs.records import DoctorRecord, ExportRecord, QuantizeRecord, TrainingRecord
from pipeline.runs.run import START, Run

_COMPARISON = "compare.md"
_DIRECTORIES = re.compile(r"(?<![\w:/.~-])[~.]{0,2}/(?:[^\s/|]+/)+")
_LEAST_SHARE = 0.05  # a language with a smaller share of the answers is not listed
_TITLES = {Stage.sft: "supervised fine-tuning", Stage.qat: "quantization-aware training"}
_SHOWN = (
    *("method", "learning_rate", "lr_scheduler", "warmup_ratio", "optimizer", "weight_decay", "precision"),
    *("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "packing", "router_aux_loss_coef", "seed"),
)
_SHOWN_OF_LORA = ("lora.rank", "lora.alpha", "lora.targets", "lora.layers", "lora.every_nth")
_SHOWN_OF_DISTILLATION = ("distillation.weight", "distillation.temperature")


@dataclass(frozen=True)
class Proven:
    """An export that passed `verify`, the artifact of this `verify`, and the base model."""

    export: Artifact
    proof: Artifact
    base: Source


def lineage(export: Artifact) -> list[Artifact]:
    """List the stages that made the exported model, oldest first.

    If the record of a stage is missing, this stage and all stages before it are omitted.
    """
    origin = export.read(ExportRecord)
    found: list[Artifact] = []
    candidates = {
        export.run_directory / origin.exported_from: export.parents["model"],
        Path(origin.exported_directory): export.parents["model"],
    }
    while made := next((made for place in candidates.items() if (made := _recorded(*place))), None):
        found.append(made)
        candidates = _parents(made)
    return found[::-1]


def _parents(made: Artifact) -> dict[Path, str]:
    """Return where the parents of a stage may be, with their fingerprints. An SFT that it continues comes first."""
    run, start = made.run_directory, made.read(TrainingRecord).start if Stage[made.stage] in _TITLES else None
    continued = {run / start: made.parents[START]} if start is not None else {}
    return continued | {run / name: fingerprint for name, fingerprint in made.parents.items() if name != START}


def trainings(stages: list[Artifact]) -> list[Artifact]:
    """Select the stages that trained weights."""
    return [each for each in stages if each.stage in [stage.name for stage in _TITLES]]


def foreign_training(stages: list[Artifact]) -> list[dict[str, object]]:
    """Describe the training of adapters of another program that the run quantized, as `training`, or nothing."""
    quantized = (each.read(QuantizeRecord) for each in stages if each.stage == Stage.quantize.name)
    is_foreign = any(record.adapters is not None for record in quantized)
    result = "adapters that another program trained, on data that is not on record here"
    return [{"title": _TITLES[Stage.sft], "result": result, "settings": {}}] if is_foreign else []


def training(stage: Artifact) -> dict[str, object]:
    """Describe a training stage: its `title`, its `result` in a sentence, and its most important `settings`."""
    trained, name = stage.read(TrainingRecord), stage.stage
    settings = {key.removeprefix(f"{name}."): value for key, value in stage.settings.items()}
    names = [*_SHOWN]
    names += _SHOWN_OF_LORA if settings["method"] == "lora" else ()
    names += _SHOWN_OF_DISTILLATION if settings.get("distillation.weight") else ()
    return {
        "title": _TITLES[Stage[name]],
        "result": f"{trained.steps} steps on {trained.counts['train_rows']} conversations; validation loss"
        f" {trained.validation_loss_before:.4f} → {trained.validation_loss:.4f} (over supervised tokens)",
        "settings": {key: _shown(settings[key]) for key in names if settings.get(key) is not None},
    }


def data(stage: Artifact) -> dict[str, str]:
    """Describe the data of a training stage, as title -> text."""
    settings, counts = stage.settings, stage.read(TrainingRecord).counts
    parts = settings["data.blend"] or [{"path": settings["data.path"], "revision": settings["data.revision"]}]
    told = {"conversations": _shown([_source(part) for part in parts])}
    told |= {key: _shown(value) for key, value in settings.items() if key.startswith("data.filter.")}
    if own := _validation(settings):
        told["validation"] = _shown(own)
    told["used"] = (
        f"{counts['train_rows']} to train, {counts['validation_rows']} {'to validate' if own else 'held out'}"
        f" (data.seed={settings['data.seed']}); up to {settings['data.max_length']} tokens each"
    )
    told["fingerprint"] = f"`{stage.data}`"
    return told


def hub_data_sets(stage: Artifact) -> list[str]:
    """List the Hub data sets that a training stage used."""
    paths = [part["path"] for part in stage.settings["data.blend"]] or [stage.settings["data.path"]]
    paths += [path for path in [stage.settings.get("data.validation.path")] if path not in (None, *paths)]
    return [path for path in paths if is_hub_id(path, needs_owner=False)]


def languages(run: Run, stage: Artifact) -> list[str]:
    """Return the ISO 639-1 codes of the languages in a training stage's answers.

    The list is empty if `doctor` has not examined this stage's data.
    """
    if not run.is_complete(Stage.doctor):
        return []
    report = artifacts.load(run.stage_dir(Stage.doctor), check_files=False)
    if report.data != stage.data:
        return []
    found = report.read(DoctorRecord).data["languages"]["answers"]
    known = {
        code: rows for code, rows in found.items() if len(code) == 2
    }  # the other keys count answers of unknown language
    return sorted(code for code, rows in known.items() if rows >= _LEAST_SHARE * sum(known.values()))


def survival(exported: ExportRecord) -> dict[str, str]:
    """Return figures, keyed by title. They show how much of the fine-tuning the exported weights keep."""
    figures: dict[str, float | None] = {name: getattr(exported, name) for name in _SURVIVAL}
    return {title: show(value) for name, (title, show) in _SURVIVAL.items() if (value := figures[name]) is not None}


def siblings(run: Run, export: Artifact) -> list[Export]:
    """Find the other exports of the same model."""
    same = [
        each for each in exports.find_all(run.directory) if each.artifact.parents["model"] == export.parents["model"]
    ]
    return [each for each in same if each.artifact.fingerprint != export.fingerprint]


def layouts(there: list[Export]) -> list[dict[str, str]]:
    """Describe exports for the card: their `layout`, `size` and `proof`."""
    return [
        {"layout": TARGETS[each.target].title, "size": f"{each.bytes / 1e9:.3g} GB", "proof": each.proof_in_words}
        for each in there
    ]


def comparison(run: Run, export: Artifact) -> str | None:
    """Return the table of `compare`. Return None if it is missing or stale, or does not cover this export.

    It covers the export if `evaluate` measured the export itself, or the model that was exported.
    """
    if not all(run.is_complete(stage) for stage in (Stage.evaluate, Stage.compare)):
        return None
    evaluated, compared = (artifacts.load(run.stage_dir(stage)) for stage in (Stage.evaluate, Stage.compare))
    measured = set(evaluated.parents.values())
    covers_it = export.fingerprint in measured or export.parents["model"] in measured
    if not covers_it or compared.parents.get("evaluate") != evaluated.fingerprint:
        return None
    return without_directories((compared.directory / _COMPARISON).read_text(encoding="utf-8")).strip()


def without_directories(text: str) -> str:
    """Shorten every path in a text to its last part."""
    return _DIRECTORIES.sub("", text)


def _recorded(directory: Path, fingerprint: str) -> Artifact | None:
    if not (directory / ARTIFACT_FILE).is_file():
        return None
    artifact = artifacts.load(directory, check_files=False)
    return artifact if artifact.fingerprint == fingerprint else None


def _validation(settings: Mapping[str, Any]) -> str | None:
    """Name the data set of data.validation, or return None if validation rows are held out."""
    path, split = settings.get("data.validation.path"), settings.get("data.validation.split")
    if path is None and split is None:
        return None
    revision = settings.get("data.validation.revision") or (None if path else settings["data.revision"])
    source = _source({"path": path or settings["data.path"], "revision": revision})
    return f"{source} (split {split})" if split else source


def _source(part: Mapping[str, Any]) -> str:
    path, revision = part["path"], part.get("revision")
    name = path if is_hub_id(path, needs_owner=False) or "://" in path else Path(path).name
    weight = f", weight {part['weight']}" if "weight" in part else ""
    return f"{name}{f' at {revision}' if revision else ''}{weight}"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(share: float) -> str:
    return f"{share:.2%}"


_SURVIVAL: dict[str, tuple[str, Callable[[float], str]]] = {
    "moved_weights": ("moved by training", _percent),
    "changed_codes": ("with another 4-bit value than the base model's", _percent),
    "survival": ("of those moved, with another 4-bit value", _percent),
    "saturated_blocks": ("blocks that clip their largest value", _percent),
    "snr_db": ("signal-to-noise ratio of rounding", "{:.2f} dB".format),
}
"""Field of `ExportRecord` -> (title of the field, function that formats its value)."""
