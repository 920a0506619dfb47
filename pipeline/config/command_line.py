"""Read the command line: recognize flags, report all mistakes together, and count and name the jobs of a sweep."""

import re
import shlex
from math import prod
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from pipeline.config import config_files, flags
from pipeline.config.groups import GROUPS, Folders
from pipeline.config.keys import is_known, is_list, is_mapping, schema, section_at, unknown_key
from pipeline.config.overrides import group_of, is_override, key_of
from pipeline.config.pipeline import Stage
from pipeline.config.values import value_problem
from pipeline.errors import did_you_mean

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_MODEL_INDEPENDENT = (
    *(
        "stage",
        "recipe",
        "run_dir",
        "doctor",
        "verify",
        "controls",
        "artifacts",
        "eval",
        "compare",
        "tracking",
        "overwrite",
    ),
)
"""Prefixes of settings that do not change a model. Jobs of a sweep that differ only in them share a directory."""
_LIST = re.compile(r"overwrite=(?:\[[\w/, ]*\]|[\w/ ]+(?:,[\w/ ]*)+)")


def asks_for(flag: str, arguments: list[str]) -> bool:
    """Return whether a flag such as --help is among the arguments. It may be abbreviated, as in --hel or -h."""
    return flag[1:3] in arguments or any(
        flag.startswith(argument) and len(argument) > len("--h") for argument in arguments
    )


def words(arguments: list[str]) -> list[str]:
    """List the arguments that are neither flags, nor values of flags, nor settings. --help explains these words."""
    before = ["", *arguments]
    return [
        argument
        for flag, argument in zip(before, arguments, strict=False)
        if argument[:1] not in ("-", "~") and "=" not in argument and flag not in flags.WITH_VALUE
    ]


def problems(arguments: list[str], folders: Folders) -> list[str]:
    """Find every override that names an unknown key, an unknown choice of a group, or a value of the wrong type.

    Configuration files that Hydra must not read are problems, too.
    """
    from hydra.errors import OverrideParseException

    found = [*flags.problems(arguments), *(_explain(word) for word in words(arguments))]
    found += config_files.problems(config_files.config_dirs_of(arguments))
    known = schema()
    has_config_dir = any(argument.startswith(("--config-dir", "-cd")) for argument in arguments)
    for argument in arguments:
        is_setting = is_override(argument) or argument.startswith("~")
        if not is_setting or argument.lstrip("+~").startswith("hydra"):
            continue  # This argument is for Hydra itself.
        try:
            (override,) = _parse([argument])
        except OverrideParseException as error:
            found.append(_unreadable(argument, error, known))
            continue
        except RecursionError:
            found.append(f"{argument:.60}…: has too many brackets inside each other.")
            continue
        if override.is_sweep_override() and not _is_sweep(arguments):
            found.append(
                f"{argument}: lists several values, which only a sweep (-m) takes. {_instead(argument, known)}"
            )
            continue
        found += _override_problems(override, known, folders, has_config_dir)
    return found


def normalize(arguments: list[str]) -> list[str]:
    """Return the arguments as Hydra's parser needs them. People may write them in other ways.

    Flags stand behind the settings, `overwrite=sft,qat` is quoted, and `+` stands only where Hydra needs it.
    """
    return [_signed(argument) for argument in quote_lists(flags.settings_first(arguments))]


def _signed(argument: str) -> str:
    """Return an override with the signs that Hydra needs. It needs `++` to set a name in a mapping.

    A known setting needs no `+`.
    """
    key = key_of(argument)
    if not is_override(argument) or argument.startswith("~") or not is_known(key):
        return argument
    return f"{'++' if is_mapping(key) else ''}{argument.lstrip('+')}"


def quote_lists(arguments: list[str]) -> list[str]:
    """Return the arguments with quotes around the list in `overwrite=sft,qat`. Hydra would read a sweep."""
    return [
        f"overwrite='{argument.partition('=')[2].strip('[]')}'" if _LIST.fullmatch(argument) else argument
        for argument in arguments
    ]


def _is_sweep(arguments: list[str]) -> bool:
    return not {"-m", "--multirun"}.isdisjoint(arguments) or any("hydra.mode=" in each for each in arguments)


def name_jobs(arguments: list[str]) -> list[str]:
    """Return the arguments. In a sweep, add the argument that tells Hydra how to name the jobs.

    A job's name lists the settings in which the jobs differ. It omits settings that do not change a model, so that a
    job has the same name in every stage of the sweep.
    """
    plain = [argument for argument in arguments if is_override(argument)]
    if not plain or not {"-m", "--multirun"} & {*arguments}:
        return arguments
    overrides = _parse(plain)
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    common = {override.key_or_group for override in overrides} - swept
    common |= {key for key in swept if key.startswith(_MODEL_INDEPENDENT)}
    left_out = ", ".join(f"'{key}'" for key in sorted(common))
    end = arguments.index(plain[-1]) + 1  # Hydra requires that overrides are adjacent
    naming = f"hydra.job.config.override_dirname.exclude_keys=[{left_out}]"
    return [*arguments[:end], naming, *arguments[end:]]


def sweep_jobs(arguments: list[str]) -> tuple[int, set[str]]:
    """Return the number of jobs in a sweep, and the keys whose values differ between the jobs.

    Without a sweep, there is one job, and no key differs.
    """
    if not {"-m", "--multirun"} & {*arguments}:
        return 1, set()
    swept = {
        override.key_or_group: len(list(override.sweep_string_iterator()))
        for override in _parse([argument for argument in arguments if is_override(argument)])
        if override.is_sweep_override()
    }
    return prod(swept.values()), set(swept)


def _parse(overrides: list[str]) -> list["Override"]:
    # This import takes longer than all other work on the command line, and help and completion do not need it.
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides(overrides)


def _unreadable(argument: str, error: Exception, known: DictConfig) -> str:
    """Return the message for an override that Hydra cannot parse. For a text, it says how to quote the value."""
    key, _, value = argument.partition("=")
    if not _takes_text(known, key.lstrip("+~")) or value[:1] in ("[", "{", "'", '"'):
        return f"{argument}: {str(error).splitlines()[0]}"
    return f"{argument}: has a character with a meaning of its own here. {_quoting(argument)}"


def _instead(argument: str, known: DictConfig) -> str:
    """Say what to write instead of several values."""
    key, _, values = argument.partition("=")
    if key == "stage":
        return "Give one command for each stage, or stage=all for every stage."
    if is_list(key):
        return f"Put the list into brackets: {key}=[{values}]"
    if key not in GROUPS and _takes_text(known, key) and not re.match(r"(?:choice|range|interval|glob)\(", values):
        return _quoting(argument)
    return "Give one value, or add -m for one job for each value."


def _takes_text(known: DictConfig, name: str) -> bool:
    return is_known(name) and not value_problem(known, name, "text")


def _quoting(argument: str) -> str:
    """Say how to quote the value of an override, for Hydra and for a shell."""
    key, _, value = argument.partition("=")
    escaped = value.replace("'", "\\'")
    word = f"{key}='{escaped}'"
    quoted = f'"{word}"' if not {*'"$`\\!'} & {*word} else shlex.quote(word)
    return f"Put the value into quotes: {quoted}"


def _explain(argument: str) -> str:
    """Return the error message for a word that stands where a setting should stand."""
    if argument in Stage.__members__:
        return f"{argument}: is not a setting. To run this stage, use stage={argument}."
    if argument == "help":
        return f"{argument}: is not a setting. Use --help."
    return f"{argument}: is not a setting. Use key=value, such as stage=all or recipe=smoke. `--help` lists all keys."


def _override_problems(override: "Override", known: DictConfig, folders: Folders, has_config_dir: bool) -> list[str]:
    name = override.key_or_group + (f"@{override.package}" if override.package else "")
    values = _values(override)
    if not values:
        return [f"{override.input_line}: does not list values for a sweep. Write them out, as in {name}=<one>,<other>."]
    if name in GROUPS or name == "train":
        choices = folders.choices(name)
        if override.is_delete() and values == [None]:
            return []
        if name == "train":
            return [f"{name}: does not name a stage. Use train@sft={values[0]} or train@qat={values[0]}."]
        return [
            f"{name}={value}: no such choice.{did_you_mean(str(value), choices)} Choose from: {', '.join(choices)}."
            for value in values
            if value not in choices and not has_config_dir
        ]
    if not is_known(name):
        return [unknown_key(name, override.input_line or name)]
    if override.is_delete():
        return [] if is_mapping(name) else [_undeletable(name)]
    if section_at(name) is not None and (group := group_of(name)) and not isinstance(values[0], dict):
        return [
            f"{name}={value}: {name} is a section with settings of its own. Use {group}={value}."
            if value in folders.choices(group)
            else f"{name}={value}: {name} is a section, not a setting. Choose {group}=<choice>"
            f" ({', '.join(folders.choices(group))}), or give its settings one by one."
            for value in values
        ]
    return [problem for value in values if (problem := value_problem(known, name, value))]


def _undeletable(name: str) -> str:
    return f"~{name}: cannot be removed, because every setting has a value. Leave it out, or set it to another value."


def _values(override: "Override") -> list[object]:
    """Return the values of an override. An interval, a glob or an empty range has none that can be listed."""
    from hydra.errors import HydraException

    if not override.is_sweep_override():
        return [override.value()]
    try:
        return list(override.sweep_string_iterator())
    except (HydraException, ValueError):  # ValueError: the step of a range is 0
        return []
