"""All inputs of a stage, and the differences between those of two builds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.runs.artifacts import Artifact
from pipeline.runs.settings import Settings, without_data_paths, without_places


@dataclass(frozen=True)
class Inputs:
    """All inputs of a stage: its result depends on nothing else.

    Attributes:
        settings: dotted key -> plain value.
        parents: fingerprint of each input, keyed by the input's name.
        data: fingerprint of the data set, or None if the stage uses none.
    """

    settings: Settings
    parents: dict[str, str]
    data: str | None

    @classmethod
    def of(cls, done: Artifact) -> "Inputs":
        """Return the inputs of a complete stage."""
        return cls(done.settings, done.parents, done.data)

    @classmethod
    def read(cls, unfinished: Mapping[str, Any]) -> "Inputs":
        """Return the inputs of an unfinished stage, from the content of its unfinished.json."""
        return cls(unfinished["settings"], unfinished["parents"], unfinished["data"])

    def plain(self) -> dict[str, object]:
        """Return the inputs as a dictionary. artifact.json and unfinished.json store this dictionary."""
        return dict(vars(self))


def list_differences(before: Inputs, now: Inputs) -> list[str]:
    """Describe the differences of two sets of inputs. Data and models are equal if their contents are."""
    has_same_data = before.data is not None and before.data == now.data
    same = {name for name, fingerprint in before.parents.items() if now.parents.get(name) == fingerprint}

    def strip(settings: Settings) -> Settings:
        known = without_places(settings, same)
        return without_data_paths(known) if has_same_data else known

    found = [
        f"{key}: was {old!r}, is {new!r}"
        for one, other in ((strip(before.settings), strip(now.settings)), (before.parents, now.parents))
        for key in sorted({*one, *other})
        if (old := one.get(key)) != (new := other.get(key))
    ]
    if before.data != now.data:
        found.append(f"the data set's contents: fingerprint was {before.data}, is {now.data}")
    return found
