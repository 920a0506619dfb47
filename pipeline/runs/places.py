"""Compare settings of which some are paths: two paths of one file or directory are equal, however they are spelled."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.config.overrides import listed_value, plain_value
from pipeline.runs.own_settings import OwnSettings
from pipeline.runs.paths import absolute
from pipeline.runs.settings import BLEND, Settings

_PATHS = ("model.path", "data.path", "data.validation.path", "quantize.source")


def differing(before: Settings, now: Mapping[str, object], own: OwnSettings | None) -> list[str]:
    """List the keys in which two sets of settings differ.

    Args:
        before: settings of a stage. Its relative paths start in the directory where its command ran.
        now: settings of the present command. Relative paths start in the working directory.
        own: the recorded settings of the stage's run, or None. They say where the stage's command ran.
    """
    keys = sorted({*before, *now})
    return [key for key in keys if not _are_same(key, before.get(key), now.get(key), own)]


def _are_same(key: str, before: object, now: object, own: OwnSettings | None) -> bool:
    recorded = None if own is None else own.overrides.get(key)
    there = None if own is None else own.working_directory
    if key in _PATHS:
        return _is_same_place(before, now, recorded and plain_value(recorded), there)
    if key == BLEND and isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = (recorded and listed_value(recorded)) or [{}] * len(before)
        whole = [part.get("path") if isinstance(part, dict) else None for part in parts]
        if len(whole) != len(before):
            return before == now
        return all(_is_same_part(*each, there) for each in zip(before, now, whole, strict=True))
    return before == now


def _is_same_part(before: Settings, now: Settings, recorded: str | None, there: str | None) -> bool:
    others = [{name: value for name, value in part.items() if name != "path"} for part in (before, now)]
    return others[0] == others[1] and _is_same_place(before.get("path"), now.get("path"), recorded, there)


def _is_same_place(before: object, now: object, recorded: str | None, there: str | None) -> bool:
    """Whether two paths lead to one file or directory. Texts that are no paths here, such as hub ids, are compared.

    Args:
        before: the path in the settings of a stage, which may be relative to an unknown directory.
        now: the path in the present settings.
        recorded: this path as the run has recorded it, or None. It is valid in the working directory.
        there: the directory where the run's last command ran, or None.
    """
    if not isinstance(before, str) or not isinstance(now, str):
        return before == now
    place, here = _place_of(before, recorded, there), absolute(now)
    return place.samefile(here) if place.exists() and here.exists() else before == now


def _place_of(before: str, recorded: str | None, there: str | None) -> Path:
    parts = Path(before).parts
    if recorded and absolute(recorded).parts[-len(parts) :] == parts:
        return absolute(recorded)
    place = Path(there or "", Path(before).expanduser()).absolute()
    return place if place.exists() else absolute(before)  # the run may have been moved with its files
