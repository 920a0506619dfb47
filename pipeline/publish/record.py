"""What the records of a run tell of its export, in words for a model card; nothing of paths or hosts."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig, Stage
from pipeline.config.hub_ids import is_hub_id
from pipeline.runs import artifacts
from pipeline.runs.artifacts import ARTIFACT_FILE, Artifact

_COMPARISON = "compare.md"
_DIRECTORIES = re.compile(r"(?<![\w:/.~-])[~.]{0,2}/(?:[^\s/|]+/)+")
_LEAST_SHARE = 0.05  # of the answers, from which on a language is one of the model's
_TITLES = {Stage.sft: "supervised fine-tuning", Stage.qat: "quantization-aware training"}
_SHOWN = (
    *("method", "learning_rate", "lr_scheduler", "warmup_ratio", "optimizer", "weight_decay", "precision"),
    *("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "packing", "router_aux_loss_coef", "seed"),
)
_SHOWN_OF_LORA = ("lora.rank", "lora.alpha", "lora.targets", "lora.layers", "lora.every_nth")
_SHOWN_OF_DISTILLATION = ("distillation.weight", "distillation.temperature")


def lineage(export: Artifact) -> list[Artifact]:
    """The stages that the exported model went through, oldest first, as far as their records are there."""
    origin, found = export.details, []
    candidates = {
        export.directory.parent / origin["exported_from"]: export.parents["model"],
        Path(origin["exported_directory"]): export.parents["model"],
    }
    while made := next((made for place in candidates.items() if (made := _recorded(*place))), None):
        found.append(made)
        candidates = {made.directory.parent / name: fingerprint for name, fingerprint in made.parents.items()}
    return found[::-1]


def trainings(stages: list[Artifact]) -> list[Artifact]:
    """Those in which weights were trained."""
    return [each for each in stages if each.stage in [stage.name for stage in _TITLES]]


def training(stage: Artifact) -> dict[str, Any]:
    """A training stage: `title`, `result` in a sentence, `settings` that matter."""
    details, name = stage.details, stage.stage
    settings = {key.removeprefix(f"{name}."): value for key, value in stage.settings.items()}
    names = [*_SHOWN]
    names += _SHOWN_OF_LORA if settings["method"] == "lora" else ()
    names += _SHOWN_OF_DISTILLATION if settings.get("distillation.weight") else ()
    before, after = details["validation_loss_before"], details["validation_loss"]
    return {
        "title": _TITLES[Stage[name]],
        "result": f"{details['steps']} steps on {details['train_rows']} conversations; validation loss {before:.4f} →"
        f" {after:.4f} (over supervised tokens)",
        "settings": {key: _shown(settings[key]) for key in names if settings.get(key) is not None},
    }


def data(stage: Artifact) -> dict[str, str]:
    """The data of a training stage, by what of it is said."""
    settings = stage.settings
    parts = settings["data.blend"] or [{"path": settings["data.path"], "revision": settings["data.revision"]}]
    told = {"conversations": _shown([_source(part) for part in parts])}
    told |= {key: _shown(value) for key, value in settings.items() if key.startswith("data.filter.")}
    told["used"] = (
        f"{stage.details['train_rows']} to train, {stage.details['validation_rows']} held out (data.seed="
        f"{settings['data.seed']}); up to {settings['data.max_length']} tokens each"
    )
    told["fingerprint"] = f"`{stage.data}`"
    return told


def hub_data_sets(stage: Artifact) -> list[str]:
    """Those of the data sets that the Hub has."""
    paths = [part["path"] for part in stage.settings["data.blend"]] or [stage.settings["data.path"]]
    return [path for path in paths if is_hub_id(path, needs_owner=False)]


def languages(config: PipelineConfig, stage: Artifact) -> list[str]:
    """ISO 639-1 codes of the languages that a training stage's answers are in, where `doctor` has looked."""
    if not artifacts.is_complete(config, Stage.doctor):
        return []
    report = artifacts.load(artifacts.stage_dir(config, Stage.doctor.name), check_files=False)
    if report.data != stage.data:
        return []
    found = report.details["data"]["languages"]["answers"]
    known = {code: rows for code, rows in found.items() if len(code) == 2}  # the others say that it cannot be told
    return sorted(code for code, rows in known.items() if rows >= _LEAST_SHARE * sum(known.values()))


def survival(export: Artifact) -> dict[str, str]:
    """How much of the fine-tuning reached the exported weights, by what is measured."""
    measured = {name: export.details[name] for name in _SURVIVAL if export.details[name] is not None}
    return {title: show(measured[name]) for name, (title, show) in _SURVIVAL.items() if name in measured}


def comparison(config: PipelineConfig, export: Artifact) -> str | None:
    """The table of `compare`, if it is of this export or of the model that it was made from."""
    if not all(artifacts.is_complete(config, stage) for stage in (Stage.evaluate, Stage.compare)):
        return None
    evaluated, compared = (
        artifacts.load(artifacts.stage_dir(config, stage.name)) for stage in (Stage.evaluate, Stage.compare)
    )
    measured = set(evaluated.parents.values())
    is_of_it = export.fingerprint in measured or export.parents["model"] in measured
    if not is_of_it or compared.parents["evaluate"] != evaluated.fingerprint:
        return None
    return without_directories((compared.directory / _COMPARISON).read_text(encoding="utf-8")).strip()


def without_directories(text: str) -> str:
    """A text with only the last part of each path in it."""
    return _DIRECTORIES.sub("", text)


def _recorded(directory: Path, fingerprint: str) -> Artifact | None:
    if not (directory / ARTIFACT_FILE).is_file():
        return None
    artifact = artifacts.load(directory, check_files=False)
    return artifact if artifact.fingerprint == fingerprint else None


def _source(part: dict[str, Any]) -> str:
    path, revision = part["path"], part.get("revision")
    name = path if is_hub_id(path, needs_owner=False) or "://" in path else Path(path).name
    weight = f", weight {part['weight']}" if "weight" in part else ""
    return f"{name}{f' at {revision}' if revision else ''}{weight}"


def _shown(value: Any) -> str:
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
"""Figure of the export's record -> what it is called, and how it is shown."""
