"""Describe how a report came about: data, date, versions, settings and hardware. Local paths are shortened to names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from pipeline import __version__
from pipeline.compare.names import ORDER, without_directory
from pipeline.compare.runs import EvaluatedRun, StageFacts, distinct_runs
from pipeline.config import Stage
from pipeline.runs.metrics import read_metrics

_TRAINING = ("method", "learning_rate", "max_steps", "epochs", "batch_size", "gradient_accumulation_steps")
_SHOWN = (
    *("upcast.experts", *(f"{stage}.{name}" for stage in ("sft", "qat") for name in (*_TRAINING, "precision", "seed"))),
    *("quantize.method", "quantize.scales", "format.name", "format.scale_rule", "export.target"),
    *("model.dtype", "data.max_samples", "data.validation_fraction", "data.seed", "data.max_length"),
    *("evaluate.max_samples", "evaluate.prompts.max_samples", "evaluate.generation.temperature"),
    *("evaluate.generation.samples", "evaluate.generation.max_new_tokens"),
)
"""Settings that the report shows. The settings of a stage are in its artifact.json in full."""


@dataclass(frozen=True)
class StageLine:
    """How one stage was run: its name, its most important settings, and its hardware."""

    stage: str
    settings: str
    hardware: str

    def cells(self) -> list[str]:
        """Return the cells of the table of stages."""
        return [self.stage, self.settings, self.hardware]


@dataclass(frozen=True)
class About:
    """Facts about the report.

    Attributes:
        summary: date, version and hardware of the evaluation, in one line.
        facts: properties that all models share: name -> value.
        stages: the stages of all runs.
    """

    summary: str
    facts: dict[str, str]
    stages: list[StageLine]


def describe(runs: list[EvaluatedRun]) -> About:
    """Describe the runs of a report."""
    evaluated = runs[0].evaluated
    base = evaluated.base_model
    facts = {
        "Base model": without_directory(base["path"])
        + (f" at revision {base['revision']}" if base["revision"] else ""),
        "Evaluation data": f"{_data(evaluated.settings.get('data.path'))}, fingerprint {evaluated.data}",
        "Runs": ", ".join(run.label for run in runs),
    }
    measured = runs[0].read_stage(Stage.evaluate.name)
    assert measured is not None
    made_on = measured.made_on
    if "libraries" in made_on:
        libraries = [f"{name} {version}" for name, version in made_on["libraries"].items()]
        facts["Libraries"] = ", ".join([*libraries, f"Python {made_on['python']}"])
    date = max((line["time"] for run in runs for line in read_metrics(run.evaluated.directory)), default=None)
    told = [] if date is None else [f"evaluated on {datetime.fromtimestamp(date, timezone.utc):%Y-%m-%d, %H:%M} UTC"]
    summary = ", ".join([*told, *filter(None, [_hardware(measured)])])
    return About(f"gpt-oss-qat {_version(made_on)}{f'; {summary}' if summary else ''}", facts, list(_stages(runs)))


def _data(path: object) -> str:
    return without_directory(str(path)) if path is not None else "a blend (data.blend)"


def _version(made_on: Mapping[str, object]) -> str:
    commit, mark, changes = str(made_on.get("git_commit") or "").partition("+")
    return f"{__version__}{f', commit {commit[:12]}{mark}{changes}' if commit else ''}"


def _hardware(stage: StageFacts) -> str:
    made_on = stage.made_on
    if "device" not in made_on:
        return ""
    return f"{made_on['processes']} × {made_on['device']}" if made_on["processes"] > 1 else f"{made_on['device']}"


def _stages(runs: list[EvaluatedRun]) -> Iterator[StageLine]:
    for stage in (*ORDER, Stage.verify.name, Stage.evaluate.name):
        for run, prefix in distinct_runs(runs, stage):
            facts = run.read_stage(stage)
            assert facts is not None
            settings = facts.artifact.settings
            shown = [f"{key}={settings[key]}" for key in _SHOWN if settings.get(key) is not None]
            yield StageLine(f"{prefix}{stage}", ", ".join(shown) or "–", _hardware(facts) or "–")
