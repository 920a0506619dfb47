"""The help names every key, stage and choice, and it starts fast."""

import ast
import dataclasses
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from conftest import run_program

from config.composing import RECIPES, ROOT, STAGES, SYNTHETIC_DATA, choices
from pipeline import __main__ as program
from pipeline import config
from pipeline.config import command_line

SOURCES = sorted(Path(config.__file__).parent.glob("*.py"))


@cache
def help_text() -> str:
    return command_line.help_text(program.CONF_DIR, program.RECIPES_DIR)


def documented_settings() -> dict[str, dict[str, str | None]]:
    """Return section -> setting -> meaning, read from the source text. Fields that hold a section are left out.

    The meanings of verify.python come from the table of engines, because the class of verify.python has no source text.
    """
    pythons = {item.name: item.metadata["meaning"] for item in dataclasses.fields(config.PythonConfig)}
    found: dict[str, dict[str, str | None]] = {"PythonConfig": pythons}
    for node in (node for path in SOURCES for node in ast.parse(path.read_text(encoding="utf-8")).body):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        fields = found.setdefault(node.name, {})
        for statement, below in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.annotation).endswith("Config"):
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
                )
                fields[ast.unparse(statement.target)] = text
    return found


def test_every_setting_has_a_meaning() -> None:
    settings = documented_settings()
    assert set(settings) >= {"PipelineConfig", "TrainConfig", "DataConfig"}
    assert [f"{name}.{key}" for name, fields in settings.items() for key, text in fields.items() if not text] == []


def sections_of(node: type, prefix: str = "") -> dict[str, list[str]]:
    """Map the key of each section to the names of its dataclass and base classes."""
    found = {prefix: [each.__name__ for each in node.__mro__ if dataclasses.is_dataclass(each)]}
    for name, kind in get_type_hints(node).items():
        key = f"{prefix}.{name}".lstrip(".")
        if dataclasses.is_dataclass(kind):
            found |= sections_of(kind, key)  # type: ignore[arg-type]
        if get_origin(kind) is list and dataclasses.is_dataclass(element := get_args(kind)[0]):
            found |= sections_of(element, f"{key}[]")
    return found


def test_the_help_names_every_setting_with_its_meaning() -> None:
    lines = help_text().splitlines()
    sections = sections_of(config.PipelineConfig)
    settings = documented_settings()
    assert set(settings) <= {name for names in sections.values() for name in names}
    for section, names in sections.items():
        meanings = {key: text for name in reversed(names) for key, text in settings[name].items()}
        for key, meaning in meanings.items():
            full = f"{section}.{key}".lstrip(".")
            (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  {full} ["))
            assert lines[at + 1].strip() == meaning


def test_the_help_names_every_key_that_the_schema_has() -> None:
    text = help_text()
    shown = {line.split(" [")[0].strip() for line in text.splitlines() if line.startswith("  ") and " [" in line}
    leaves = {key for key in config.setting_keys() if not any(k.startswith(f"{key}.") for k in config.setting_keys())}
    assert leaves <= shown


def test_the_help_names_every_stage_recipe_and_choice() -> None:
    text = help_text()
    stages, groups = (
        {
            line.split()[0]: line.split(None, 1)[1]
            for line in text.partition(f"\n{name}")[2].split("\n\n")[0].splitlines()[1:]
        }
        for name in ("stages", "groups")
    )
    assert list(stages) == STAGES
    assert all(recipe in groups["recipe"] for recipe in RECIPES)
    assert all(choice.partition("=")[2] in groups[choice.partition("=")[0]] for choice in choices())


def test_the_help_shows_defaults_as_they_are_written_on_the_command_line() -> None:
    lines = help_text().splitlines()
    for line in (
        "  overwrite [false]",
        "  data.max_samples [null]",
        "  model.path [required]",
        "  data.path [null]",
        "  sft.precision [mixed_bf16] (fp32 | mixed_bf16 | bf16)",
        "  sft.lr_scheduler [cosine] (cosine | linear | constant | constant_with_warmup | polynomial | inverse_sqrt)",
        "  sft.lora.targets [attention, experts] (attention | experts)",
        "  verify.engines [] (transformers | openai | llama_cpp | mlx | vllm)",
    ):
        assert line in lines


@pytest.mark.parametrize("arguments", [["-h"], ["sft.lr=1", "--help", "recipe=nonsense"]])
def test_the_help_is_shown_despite_other_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(*arguments) == 0
    assert capsys.readouterr().out == f"{help_text()}\n"


def seconds_of_children() -> float:
    """Return the processor time of all child processes that have ended. Other load does not change it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("arguments", "status", "start"),
    [
        (["--help"], 0, "usage: python -m pipeline"),
        (["stage=sft", "sft.lr=1"], 2, "error: sft.lr=1: unknown key"),
        (["stage=sft", SYNTHETIC_DATA, "sft.learning_rate=0"], 2, "error: sft.learning_rate=0.0: must be"),
    ],
)
def test_help_and_mistakes_answer_within_two_seconds_and_import_nothing_slow(
    arguments: list[str], status: int, start: str
) -> None:
    before = seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert seconds_of_children() - before < 2
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    said = [done.stdout, *(line for line in lines if not line.startswith("import time:"))]
    assert (done.returncode, "".join(said)[: len(start)]) == (status, start)
    assert "hydra" in imported
    assert imported & {"torch", "transformers", "trl", "peft", "modelopt", "datasets", "accelerate"} == set()
