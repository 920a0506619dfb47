"""Check the types of values, and say which values a setting takes."""

from dataclasses import fields

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.config.descriptions import describe_settings
from pipeline.config.keys import section_at
from pipeline.config.overrides import override_of
from pipeline.errors import did_you_mean


def value_problem(known: DictConfig, key: str, value: object) -> str | None:
    """Set `key` to `value` in `known`. Return the error message if the value has the wrong type, else None."""
    try:
        OmegaConf.update(known, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        return f"{override_of(key, value)}: {_needed(key, value) or str(error).splitlines()[0]}"
    return None


def _needed(key: str, value: object) -> str | None:
    """Say what a value of the wrong type should be. Return None if OmegaConf's message is better."""
    if (section := section_at(key)) is not None:
        first = f"{key}.{fields(section)[0].name}"
        return None if isinstance(value, dict) else f"{key} is a section. Give its settings, as in {first}=<value>."
    setting = next((each for each in describe_settings() if each.key == key), None)
    if setting is None or setting.type.startswith("settings"):
        return None
    is_list = setting.type.startswith("list")
    if isinstance(value, list) and not is_list:
        return f"lists several values, but {key} takes one ({_with_article(setting.type)})."
    if not setting.choices:
        return f"must be {_with_article(setting.type)}."
    null = ("null",) if setting.type.endswith("or null") else ()
    names = ", ".join((*setting.choices, *null))
    if is_list:
        return f"must be a list of names, as in {key}=[{setting.choices[0]}]. Choose from: {names}."
    return f"no such choice.{did_you_mean(str(value), setting.choices)} Choose from: {names}."


def _with_article(kind: str) -> str:
    return kind if kind.startswith(("text", "true")) else f"a {kind}"
