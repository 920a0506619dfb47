"""What stands on the command line: a help that a person can read, and all mistakes found at once."""

import ast
import inspect
import sys
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import DictConfig

from pipeline import config
from pipeline.errors import did_you_mean

_GROUPS = {
    "recipe": "the experiment: what differs from the defaults",
    "model": "the checkpoint to start from",
    "data": "the data set",
    "train@sft": "full or lora, for SFT",
    "train@qat": "full or lora, for QAT",
    "format": "the 4-bit format",
    "eval": "what models are asked, beyond their validation loss",
    "sharding": "how processes share a model while it is trained",
    "tracking": "where metrics go besides metrics.jsonl",
}
_OF_NO_MODEL = ("stage", "recipe", "run_dir", "doctor", "verify", "eval", "compare", "tracking", "overwrite")
"""How settings begin that change no model: jobs of a sweep that differ in them alone share a directory."""
_HELP_FLAGS = ("--help", "-h")
_STAGES = {
    "doctor": "look at the data, at what the run needs, and whether it fits here",
    "upcast": "MXFP4 checkpoint -> BF16, exact to the bit",
    "sft": "supervised fine-tuning",
    "quantize": "insert fake quantization: the PTQ baseline",
    "qat": "quantization-aware training from there, at a low learning rate",
    "export": "a real MXFP4 checkpoint, in the layout of the original",
    "verify": "prove that the export is right",
    "evaluate": "loss, perplexity, size and weight error of a stage's model",
    "compare": "a report on what each step won or lost, of one run or several",
    "all": "all of these in order; skips what is up to date, resumes what was interrupted",
    "publish": "the proven export with a model card; export.push_to_hub uploads it, and makes this a part of all",
    "serve": "start vLLM, SGLang, TensorRT-LLM or llama.cpp on the proven export, and ask it a question",
}


def asks_for_help(arguments: list[str]) -> bool:
    """Whether --help or -h is there."""
    return any(argument in _HELP_FLAGS for argument in arguments)


def problems(arguments: list[str], conf: Path, recipes: Path) -> list[str]:
    """Every override that names an unknown key, an unknown choice of a group, or a value of the wrong type."""
    found: list[str] = []
    known = config.schema()
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument or argument.lstrip("+~").startswith("hydra"):
            continue  # Hydra's own
        try:
            (override,) = OverridesParser.create().parse_overrides([argument])
        except OverrideParseException as error:
            found.append(f"{argument}: {str(error).splitlines()[0]}")
            continue
        found += _override_problems(override, known, conf, recipes)
    return found


def naming_jobs(arguments: list[str]) -> list[str]:
    """The arguments, and in a sweep one that tells Hydra to name jobs by the settings in which they differ.

    Not by what all have in common, nor by what makes no other model: so each stage of a sweep finds the same names.
    """
    plain = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    if not plain or not {"-m", "--multirun"} & {*arguments}:
        return arguments
    overrides = OverridesParser.create().parse_overrides(plain)
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    common = {override.key_or_group for override in overrides} - swept
    common |= {key for key in swept if key.startswith(_OF_NO_MODEL)}
    left_out = ", ".join(f"'{key}'" for key in sorted(common))
    end = arguments.index(plain[-1]) + 1  # overrides have to stand together
    naming = f"hydra.job.config.override_dirname.exclude_keys=[{left_out}]"
    return [*arguments[:end], naming, *arguments[end:]]


def help_text(conf: Path, recipes: Path) -> str:
    """The whole help: usage, stages, groups with their choices, every setting with its default and meaning."""
    lines = [
        "usage: python -m pipeline stage=<stage> recipe=<recipe> [key=value …]",
        "",
        "  python -m pipeline stage=all recipe=smoke            every stage on a tiny model",
        "  python -m pipeline stage=sft recipe=multilingual     one stage of one recipe",
        "  accelerate launch -m pipeline stage=sft …            the same on several GPUs",
        "  python -m pipeline -m stage=qat recipe=smoke format=mxfp4,nvfp4   a sweep: a directory for each job",
        "",
        "stages",
        *(f"  {name:<10}{meaning}" for name, meaning in _STAGES.items()),
        "",
        "groups (group=choice)",
        *(
            f"  {group:<11}{', '.join(_choices(group, conf, recipes))}   ({meaning})"
            for group, meaning in _GROUPS.items()
        ),
        "",
        "settings (key=value; [default], which recipes change)",
        *_settings_help(config.PipelineConfig, ""),
        "",
        "flags",
        "  --cfg job        print the composed configuration and leave",
        "  -m, --multirun   sweep over comma-separated values",
        "  --config-dir D   more configuration files, among them recipes in D/recipe/ (line 1: # @package _global_)",
        "  --hydra-help     Hydra's own flags",
        "",
        "exit status: 0 done or up to date, 2 your mistake, 1 a failed check or a bug, 130 interrupted",
    ]
    return "\n".join(lines)


def _override_problems(override: Override, known: DictConfig, conf: Path, recipes: Path) -> list[str]:
    name = override.key_or_group + (f"@{override.package}" if override.package else "")
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    if name in _GROUPS or name == "train":
        choices = _choices(name, conf, recipes)
        if name == "train":
            return [f"{name}: say for which stage: train@sft={values[0]} or train@qat={values[0]}."]
        return [
            f"{name}={value}: no such choice.{did_you_mean(str(value), choices)} Choose from: {', '.join(choices)}."
            for value in values
            if value not in choices and not _has_config_dir()
        ]
    if not config.is_known(name):
        return [config.unknown_key(name, override.input_line or name)]
    if override.is_delete():
        return []
    return [problem for value in values if (problem := config.value_problem(known, name, value))]


def _has_config_dir() -> bool:
    return any(argument.startswith(("--config-dir", "-cd")) for argument in sys.argv)


def _choices(group: str, conf: Path, recipes: Path) -> list[str]:
    folder = recipes if group == "recipe" else conf / group.partition("@")[0]
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _settings_help(node: Any, prefix: str) -> list[str]:
    """One line per setting; the meaning is the string that stands under the field in config.py."""
    meanings = _meanings(node)
    lines: list[str] = []
    for item in fields(node):
        key = f"{prefix}{item.name}"
        if is_dataclass(item.type):
            lines += _settings_help(item.type, f"{key}.")
        else:
            lines.append(f"  {key} [{_default(item)}]{_values(item.type)}")
            lines.append(f"      {meanings[item.name]}")
            if get_origin(item.type) is list and is_dataclass(element := get_args(item.type)[0]):
                lines += _settings_help(element, f"{key}[].")
    return lines


def _meanings(node: Any) -> dict[str, str]:
    """Field -> its meaning, inherited fields included."""
    found: dict[str, str] = {}
    sections: list[Any] = [each for each in reversed(node.__mro__) if is_dataclass(each)]
    for each in sections:
        body = ast.parse(inspect.getsource(each)).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[statement.target.id] = str(below.value.value)
    return found


def _default(item: Any) -> str:
    value = item.default_factory() if item.default_factory is not NO_DEFAULT else item.default
    values = value if isinstance(value, list) else [value]
    shown = ", ".join(str(v.name if isinstance(v, Enum) else v) for v in values)
    return {"None": "null", "???": "required", "True": "true", "False": "false"}.get(shown, shown)


def _values(kind: Any) -> str:
    return (
        f" ({' | '.join(member.name for member in kind)})" if inspect.isclass(kind) and issubclass(kind, Enum) else ""
    )
