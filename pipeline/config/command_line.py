"""Read the command line: print the help, report all mistakes together, and name the jobs of a sweep."""

import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from pipeline.config.descriptions import describe_settings
from pipeline.config.keys import is_known, schema, unknown_key, value_problem
from pipeline.config.pipeline import Stage
from pipeline.errors import did_you_mean

_GROUPS = {
    "recipe": "the experiment, as changes to the defaults",
    "model": "the checkpoint to start from",
    "data": "the data set",
    "train@sft": "full or lora, for SFT",
    "train@qat": "full or lora, for QAT",
    "format": "the 4-bit format",
    "eval": "prompts and task suites to evaluate, in addition to the validation loss",
    "sharding": "how training processes share a model",
    "tracking": "a service that also gets the metrics of metrics.jsonl",
}
_MODEL_INDEPENDENT = (
    *("stage", "recipe", "run_dir", "doctor", "verify", "controls", "eval", "compare", "tracking", "overwrite"),
)
"""Prefixes of settings that do not change a model. Jobs of a sweep that differ only in them share a directory."""
_HELP_FLAGS = ("--help", "-h")


def asks_for_help(arguments: list[str]) -> bool:
    """Return whether --help or -h is among the arguments."""
    return any(argument in _HELP_FLAGS for argument in arguments)


def problems(arguments: list[str], conf: Path, recipes: Path) -> list[str]:
    """Find every override that names an unknown key, an unknown choice of a group, or a value of the wrong type."""
    found: list[str] = []
    known = schema()
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument or argument.lstrip("+~").startswith("hydra"):
            continue  # This argument is for Hydra itself.
        try:
            (override,) = OverridesParser.create().parse_overrides([argument])
        except OverrideParseException as error:
            found.append(f"{argument}: {str(error).splitlines()[0]}")
            continue
        found += _override_problems(override, known, conf, recipes)
    return found


def name_jobs(arguments: list[str]) -> list[str]:
    """Return the arguments. In a sweep, add the argument that tells Hydra how to name the jobs.

    A job's name lists the settings in which the jobs differ. It omits settings that do not change a model, so that a
    job has the same name in every stage of the sweep.
    """
    plain = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if not plain or not {"-m", "--multirun"} & {*arguments}:
        return arguments
    overrides = OverridesParser.create().parse_overrides(plain)
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    common = {override.key_or_group for override in overrides} - swept
    common |= {key for key in swept if key.startswith(_MODEL_INDEPENDENT)}
    left_out = ", ".join(f"'{key}'" for key in sorted(common))
    end = arguments.index(plain[-1]) + 1  # Hydra requires that overrides are adjacent
    naming = f"hydra.job.config.override_dirname.exclude_keys=[{left_out}]"
    return [*arguments[:end], naming, *arguments[end:]]


def help_text(conf: Path, recipes: Path) -> str:
    """Return the whole help: usage, stages, groups with their choices, and every setting with default and meaning."""
    lines = [
        "usage: python -m pipeline stage=<stage> recipe=<recipe> [key=value …]",
        "",
        "  python -m pipeline stage=all recipe=smoke            every stage on a tiny model",
        "  python -m pipeline stage=sft recipe=multilingual     one stage of one recipe",
        "  accelerate launch -m pipeline stage=sft …            one stage on several GPUs",
        "  python -m pipeline -m stage=qat recipe=smoke format=mxfp4,nvfp4   a sweep: one job for each value",
        "",
        "stages",
        *(f"  {stage.name:<10}{stage.value}" for stage in Stage),
        "",
        "groups (group=choice)",
        *(
            f"  {group:<11}{', '.join(_choices(group, conf, recipes))}   ({meaning})"
            for group, meaning in _GROUPS.items()
        ),
        "",
        "settings (key=value; the default is in brackets, and a recipe may change it)",
        *_settings_help(),
        "",
        "flags",
        "  --cfg job        print the composed configuration and exit",
        "  -m, --multirun   sweep over comma-separated values",
        "  --config-dir D   add configuration files, such as recipes in D/recipe/ (line 1: # @package _global_)",
        "  --hydra-help     Hydra's own flags",
        "",
        "exit status: 0 done or up to date, 2 your mistake, 1 a failed check or machine, or a bug, 130 interrupted",
    ]
    return "\n".join(lines)


def _override_problems(override: Override, known: DictConfig, conf: Path, recipes: Path) -> list[str]:
    name = override.key_or_group + (f"@{override.package}" if override.package else "")
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    if name in _GROUPS or name == "train":
        choices = _choices(name, conf, recipes)
        if name == "train":
            return [f"{name}: does not name a stage. Use train@sft={values[0]} or train@qat={values[0]}."]
        return [
            f"{name}={value}: no such choice.{did_you_mean(str(value), choices)} Choose from: {', '.join(choices)}."
            for value in values
            if value not in choices and not _has_config_dir()
        ]
    if not is_known(name):
        return [unknown_key(name, override.input_line or name)]
    if override.is_delete():
        return []
    return [problem for value in values if (problem := value_problem(known, name, value))]


def _has_config_dir() -> bool:
    return any(argument.startswith(("--config-dir", "-cd")) for argument in sys.argv)


def _choices(group: str, conf: Path, recipes: Path) -> list[str]:
    folder = recipes if group == "recipe" else conf / group.partition("@")[0]
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _settings_help() -> Iterator[str]:
    """Yield two lines per setting: first its key, default and choices, then its meaning."""
    for each in describe_settings():
        yield f"  {each.key} [{each.default}]" + (f" ({' | '.join(each.choices)})" if each.choices else "")
        yield f"      {each.meaning}"
