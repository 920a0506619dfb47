"""The help names every key, stage and choice."""

import ast
import dataclasses
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from conftest import run_program

import pipeline
from config.composing import RECIPES, ROOT, STAGES, Mistake, choices
from pipeline import __main__ as program
from pipeline import config
from pipeline.config import Stage, command_line, help
from pipeline.config.descriptions import describe_settings

SOURCES = sorted(Path(config.__file__).parent.glob("*.py"))


@cache
def help_text() -> str:
    return help.whole(program.FOLDERS)


def unwrapped(text: str) -> str:
    """Join the lines of a text, and reduce all white space to single spaces."""
    return " ".join(text.split())


def block_of(key: str) -> str:
    """Return the lines of a setting in the help, joined."""
    lines = help_text().splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"  {key} ["))
    below = [i for i, line in enumerate(lines) if i > start and not line.startswith(" " * 6)]
    return unwrapped("\n".join(lines[start : min(below, default=len(lines))]))


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
    sections = sections_of(config.PipelineConfig)
    settings = documented_settings()
    assert set(settings) <= {name for names in sections.values() for name in names}
    for section, names in sections.items():
        meanings = {key: text for name in reversed(names) for key, text in settings[name].items()}
        for key, meaning in meanings.items():
            full = f"{section}.{key}".lstrip(".")
            assert block_of(full).endswith(f") {meaning}")


def test_the_help_names_every_key_that_the_schema_has() -> None:
    text = help_text()
    shown = {line.split(" [")[0].strip() for line in text.splitlines() if line.startswith("  ") and " [" in line}
    leaves = {key for key in config.setting_keys() if not any(k.startswith(f"{key}.") for k in config.setting_keys())}
    assert leaves <= shown


def test_the_help_names_every_stage_recipe_and_choice() -> None:
    stages, groups = (help_text().partition(f"\n{name}")[2].split("\n\n")[0] for name in ("stages", "groups"))
    assert [line.split()[0] for line in stages.splitlines()[1:] if line[2] != " "] == STAGES
    named = {word.strip(",") for word in groups.split()}
    assert named >= {*RECIPES, *(choice.partition("=")[2] for choice in choices())}


def test_every_line_of_the_help_fits_into_100_columns() -> None:
    assert max(map(len, help_text().splitlines())) <= 100
    assert max(map(len, help.START.splitlines())) <= 100


@pytest.mark.parametrize(
    ("key", "facts"),
    {
        "controls": "[false] (true or false)",
        "data.max_samples": "[null] (whole number or null, greater than 0)",
        "model.path": "[required] (text)",
        "data.path": "[null] (text or null)",
        "data.validation_fraction": "[0.1] (number, between 0 and 1, both excluded)",
        "sft.precision": "[mixed_bf16] (fp32 | mixed_bf16 | bf16)",
        "sft.lora.targets": "[attention, experts] (attention | experts)",
        "sft.lora.layers": "[null] (list of whole numbers or null)",
        "upcast.experts": "[null] (packed | bf16 | null)",
        "data.roles": "[{}] (mapping of texts to texts)",
        "verify.engines": "[] (transformers | openai | llama_cpp | mlx | vllm)",
    }.items(),
)
def test_the_help_shows_defaults_types_choices_and_bounds(key: str, facts: str) -> None:
    assert block_of(key).startswith(f"{key} {facts} ")


@pytest.mark.parametrize("arguments", [["-h"], ["--hel"], ["sft.lr=1", "--help", "recipe=nonsense"]])
def test_the_help_is_shown_despite_other_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(*arguments) == 0
    assert capsys.readouterr().out == f"{help_text()}\n"


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_help_about_a_section_has_its_purpose_and_all_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--help", "qat") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"stage=qat\n  {Stage.qat.value}.\n")
    assert (config.QatConfig.__doc__ or "") in unwrapped(text)
    shown = [line.split()[0] for line in text.splitlines() if line.startswith("  qat.")]
    assert shown == [each.key for each in describe_settings() if each.key.startswith("qat.")]
    assert max(map(len, text.splitlines())) <= 100


def test_the_help_about_a_setting_has_all_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--help", "sft.learning_rate") == 0
    rows = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    (setting,) = (each for each in describe_settings() if each.key == "sft.learning_rate")
    assert rows == [
        ["sft.learning_rate"],
        ["type", "number"],
        ["default", setting.default],
        ["bounds", "greater than 0"],
        ["meaning", setting.meaning],
    ]


def test_the_help_about_a_group_has_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--help", "recipe") == 0
    text = unwrapped(capsys.readouterr().out)
    assert ", ".join(RECIPES) in text and "recipe type text" in text
    assert run_program("train", "--help") == 0
    assert capsys.readouterr().out.count("bf16_parts, full, lora") == 2


def test_the_help_about_a_choice_of_a_group_shows_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--help", "data=sharegpt", "recipe=smoke") == 0
    text = capsys.readouterr().out
    assert (
        text.startswith("data=sharegpt\n  # Any data set in ShareGPT form.") and "    messages: conversations\n" in text
    )
    assert "\n\nrecipe=smoke\n" in text and len(text.splitlines()) < 200


@pytest.mark.parametrize("name", help.names_to_explain())
def test_every_known_name_is_explained(name: str) -> None:
    assert name.rpartition(".")[2] in help.part([name], program.FOLDERS)


@pytest.mark.parametrize(
    ("name", "meant"),
    {"learning_rate": "'sft.learning_rate'", "exprot": "'export'", "sft.lora.rang": "'sft.lora.rank'"}.items(),
)
def test_an_unknown_name_is_refused_with_a_similar_one(name: str, meant: str, mistake: Mistake) -> None:
    message = mistake("--help", name)
    assert message.startswith(f"--help {name}: no such stage, group, section or setting. Did you mean {meant}")


@pytest.mark.parametrize(
    ("word", "advice"),
    {
        "sft": "To run this stage, use stage=sft.",
        "help": "Use --help.",
        "now": "Use key=value, such as stage=all",
    }.items(),
)
def test_a_word_that_is_no_setting_is_refused_with_advice(word: str, advice: str, mistake: Mistake) -> None:
    assert mistake(word, "recipe=smoke").startswith(f"{word}: is not a setting. {advice}")


# --- without a stage --------------------------------------------------------------------------------------------------


def test_without_arguments_a_screen_says_what_to_run_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program() == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{help.START}\n")
    commands = [line.split("  ")[1] for line in help.START.splitlines() if line.startswith("  python -m pipeline ")]
    overrides = [command.removeprefix("python -m pipeline ").split() for command in commands]
    assert ["stage=all", "recipe=smoke"] in overrides
    for arguments in overrides:
        if arguments[0].startswith("--"):
            assert run_program(*arguments) == 0
        else:
            assert command_line.problems(arguments, program.FOLDERS) == []


def test_the_version_names_the_program_its_commit_and_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("--version") == 0
    own, libraries, python = capsys.readouterr().out.splitlines()
    assert own.startswith(f"gpt-oss-qat {pipeline.__version__}")
    assert (", commit " in own) == (ROOT / ".git").exists()
    assert f"torch {version('torch')}, transformers {version('transformers')}, trl " in libraries
    assert python.startswith(f"Python {platform.python_version()}, ")
