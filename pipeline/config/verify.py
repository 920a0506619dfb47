"""Settings of `verify`: the proof that an export is correct."""

from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Annotated, Any, Optional

from pipeline.config.bounds import NOT_NEGATIVE, POSITIVE
from pipeline.config.choices import add_members
from pipeline.config.engines import LIBRARIES


class LoadingEngine(Enum):
    """Engines in which `verify` can load an export: the rows of LIBRARIES."""

    add_members(vars(), LIBRARIES)


PythonConfig: Any = make_dataclass(
    "PythonConfig",
    [
        (
            name,
            Optional[str],
            field(
                default=None,
                metadata={
                    "meaning": f"Path of the Python that has {library.distribution}; null: this program's Python."
                },
            ),
        )
        for name, library in LIBRARIES.items()
    ],
    namespace={
        "__doc__": "Path of the Python in each engine's environment. The fields come from LIBRARIES.",
        "__module__": __name__,
    },
)


@dataclass
class VerifyConfig:
    """Prove that an export stores the trained model correctly."""

    checkpoint: Optional[str] = None
    """Directory of the export to check; null: this run's export (export.target, or the last one)."""
    reference: Optional[str] = None
    """Base checkpoint to compare the export with; null: model.path."""
    samples: Annotated[int, POSITIVE] = 8
    """Number of validation examples whose logits are compared."""
    logits_tolerance: Annotated[float, NOT_NEGATIVE] = 1.0e-4
    """How far the export's logits may differ from the trained model's logits. Rounding causes small differences."""
    engines: list[LoadingEngine] = field(default_factory=list)
    """Engines that load the export as a test. An engine that is not installed is reported as not checked."""
    python: PythonConfig = field(default_factory=PythonConfig)
    engine_seconds: Annotated[float, POSITIVE] = 600.0
    """Time limit for an engine to load the export and answer, in seconds."""
