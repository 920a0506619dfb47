"""Make the texts of the help: the whole help, its parts, and the screen that a command without arguments shows.

All facts about settings come from their definitions. Every line fits into WIDTH columns.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from textwrap import indent, wrap

from pipeline.config.descriptions import Description, describe_settings
from pipeline.config.groups import GROUPS, Folders
from pipeline.config.keys import section_at
from pipeline.config.pipeline import PipelineConfig, Stage
from pipeline.errors import did_you_mean, user_errors

WIDTH = 100
_EXAMPLES = (
    ("stage=all recipe=smoke", "every stage on a tiny model"),
    ("stage=sft recipe=multilingual", "one stage of one recipe"),
    ("stage=export run_dir=runs/multilingual", "the next stage, with the settings of the run"),
    ("-m stage=qat recipe=smoke format=mxfp4,nvfp4", "a sweep: one job for each value"),
)
_FLAGS = (
    ("--help NAME", "explain only a stage, group, choice, section or setting, such as sft or data=sharegpt"),
    ("--version", "print the versions of this program and of the main libraries"),
    ("--cfg job", "print the composed configuration and exit"),
    ("-m, --multirun", "sweep over comma-separated values"),
    ("--config-dir D", "add configuration files, such as recipes in D/recipe/ (line 1: # @package _global_)"),
    ("-sc install=SHELL", "print the code that lets bash, zsh or fish complete arguments"),
    ("--hydra-help", "Hydra's own flags"),
)
_EXIT_STATUS = (
    "exit status: 0 done or up to date, 2 your mistake, 1 a failed check or machine, or a bug, 130 interrupted"
)
START = """\
gpt-oss-qat fine-tunes gpt-oss and serves it in MXFP4. Nothing has run, because no stage is given.

Try it on a laptop's CPU, with a tiny model that learns sums (a few minutes):
  python -m pipeline stage=all recipe=smoke

Then use your own conversations, one JSON object with "messages" per line:
  python -m pipeline stage=doctor recipe=own_data data.path=chats.jsonl    check data and memory
  python -m pipeline stage=all recipe=own_data data.path=chats.jsonl       train gpt-oss-20b (GPU)
  Add model=tiny run_dir=runs/try to try both on a CPU.

Learn more:
  python -m pipeline --help                all stages, recipes and settings
  python -m pipeline --help sft            one stage, group, section or setting
  README.md, docs/index.md                 the documentation
  python -m pipeline --shell-completion    let the Tab key complete arguments"""
"""The screen of a command without arguments."""


def whole(folders: Folders) -> str:
    """Return the whole help: usage, stages, groups with their choices, flags, and every setting by section."""
    parts = [
        "usage: python -m pipeline stage=<stage> recipe=<recipe> [key=value …]",
        "\n".join(_row(f"python -m pipeline {arguments}", meaning, 64) for arguments, meaning in _EXAMPLES),
        "\n".join(["stages (stage=<name>)", *(_row(stage.name, stage.value, 10) for stage in Stage)]),
        "\n".join(["groups (group=choice)", *(_group(name, folders) for name in GROUPS)]),
        "\n".join(["flags", *(_row(flag, meaning, 18) for flag, meaning in _FLAGS)]),
        "\n".join(wrap(_EXIT_STATUS, WIDTH, subsequent_indent="  ")),
        "settings (key=value; the default is in brackets, and a recipe may change it)",
        _settings(each for each in describe_settings() if "." not in each.key),
    ]
    parts += [_section(item.name) for item in fields(PipelineConfig) if section_at(item.name) is not None]
    return "\n\n".join(parts)


def part(names: list[str], folders: Folders) -> str:
    """Return the help about stages, groups, sections and settings with these names.

    Raises:
        UserError: a name is unknown. The message suggests similar names.
    """
    known = names_to_explain()
    unknown = [
        f"--help {name}: no such stage, group, section or setting.{did_you_mean(name, known)}"
        " `--help` without a name lists all."
        for name in names
        if name not in known
    ]
    if unknown:
        raise user_errors(unknown)
    return "\n\n".join(block for name in dict.fromkeys(names) for block in _blocks(name, folders))


def choice(words: list[str], folders: Folders) -> str | None:
    """Return the help about choices of groups, such as data=sharegpt: their files. Return None for other words."""
    pairs = [word.partition("=") for word in words]
    if not words or not all(group in GROUPS and name in folders.choices(group) for group, _, name in pairs):
        return None
    return "\n\n".join(_choice(group, name, folders) for group, _, name in pairs)


def _choice(group: str, name: str, folders: Folders) -> str:
    text = folders.file(group, name).read_text(encoding="utf-8").rstrip()
    return f"{group}={name}\n" + indent(text, "  ")


def names_to_explain() -> list[str]:
    """List the names that `part` knows. Stages come first, then groups, sections and settings."""
    keys = [each.key for each in describe_settings()]
    sections = [key[:i].removesuffix("[]") for key in keys for i, letter in enumerate(key) if letter == "."]
    return list(dict.fromkeys([*(stage.name for stage in Stage), *GROUPS, "train", *sections, *keys]))


def _blocks(name: str, folders: Folders) -> Iterator[str]:
    if name in Stage.__members__:
        yield f"stage={name}\n" + _indented(f"{Stage[name].value}.", 2)
    for group in GROUPS:
        if name in (group, group.partition("@")[0]):
            yield "\n".join(
                [f"{group}=<choice>", _indented(f"Choose {GROUPS[group]}.", 2), _choices(group, folders, 2)]
            )
    if section_at(name) is not None:
        yield _section(name)
    elif found := [each for each in describe_settings() if each.key == name or each.key.startswith(f"{name}[].")]:
        yield "\n".join(_details(each) for each in found)


def _section(name: str) -> str:
    """Return the help about a section: its purpose, then its settings, and those of the sections in it."""
    section = section_at(name)
    assert section is not None and is_dataclass(section)
    own = _settings(each for each in describe_settings() if each.key.startswith(f"{name}."))
    return f"{name}\n{_indented(_purpose(section), 2)}\n{own}"


def _purpose(section: type) -> str:
    return " ".join((section.__doc__ or "").split())


def _settings(settings: Iterable[Description]) -> str:
    return "\n".join(line for each in settings for line in (_headline(each), _indented(each.meaning, 6)))


def _headline(setting: Description) -> str:
    """Return a setting's key, default and values. Example: `sft.learning_rate [2e-05] (number, greater than 0)`."""
    null = ("null",) if setting.type.endswith("or null") else ()
    values = " | ".join((*setting.choices, *null)) if setting.choices else ", ".join((setting.type, *setting.limits))
    return _indented(f"{setting.key} [{setting.default}] ({values})", 2, 6)


def _details(setting: Description) -> str:
    rows = {
        "type": setting.type,
        "default": setting.default or "empty",
        "choices": ", ".join(setting.choices),
        "bounds": "; ".join(setting.limits),
        "meaning": setting.meaning,
    }
    return "\n".join([setting.key, *(_row(name, text, 9) for name, text in rows.items() if text)])


def _group(name: str, folders: Folders) -> str:
    return f"{_row(name, GROUPS[name], 10)}\n{_choices(name, folders, 13)}"


def _choices(group: str, folders: Folders, columns: int) -> str:
    return _indented(", ".join(folders.choices(group)), columns)


def _row(name: str, meaning: str, width: int) -> str:
    """Return a name and its meaning in two columns. The first column has `width` columns, or more for a long name."""
    first = f"  {name:<{width}} "
    return "\n".join(wrap(first + meaning, WIDTH, subsequent_indent=" " * (width + 3), drop_whitespace=True))


def _indented(text: str, columns: int, further: int | None = None) -> str:
    """Wrap a text. Its first line is indented by `columns`, and the others by `further`, or also by `columns`."""
    others = " " * (columns if further is None else further)
    lines = wrap(text, WIDTH, initial_indent=" " * columns, subsequent_indent=others, break_on_hyphens=False)
    return "\n".join(lines)
