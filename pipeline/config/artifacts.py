"""Settings of `artifacts`: how a stage checks the results of earlier stages before it uses them."""

from dataclasses import dataclass
from enum import Enum


class ArtifactCheck(Enum):
    """Checks of the files of an artifact."""

    size = "size"
    full = "full"


@dataclass
class ArtifactsConfig:
    """How a stage checks its input artifacts."""

    check: ArtifactCheck = ArtifactCheck.size
    """Before a stage works, compare the input files' sizes (size), or also their digests (full: reads every byte)."""
