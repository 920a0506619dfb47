"""`verify`: the proof that an export is correct."""

from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Annotated, Any, Optional

from pipeline.config.bounds import NOT_NEGATIVE, POSITIVE
from pipeline.config.choices import add_members
from pipeline.config.engines import LIBRARIES


class LoadingEngine(Enum):
    """Engines that `verify` can load an export in: the rows of LIBRARIES."""

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
                    "meaning": f"Python executable that has {library.distribution}; null: the Python of this program."
                },
            ),
        )
        for name, library in LIBRARIES.items()
    ],
    namespace={
        "__doc__": "Python of each engine's environment. A new engine needs no edit here.",
        "__module__": __name__,
    },
)


@dataclass
class VerifyConfig:
    """Prove that an export is correct."""

    checkpoint: Optional[str] = None
    """Directory of any export to check; null: this run's export."""
    reference: Optional[str] = None
    """Base checkpoint of the fine-tuned model, to compare with; null: model.path."""
    samples: Annotated[int, POSITIVE] = 8
    """Validation examples whose logits are compared."""
    logits_tolerance: Annotated[float, NOT_NEGATIVE] = 1.0e-4
    """Largest allowed difference of a logit, because the order of sums may differ. Weights are compared bit for bit."""
    engines: list[LoadingEngine] = field(default_factory=list)
    """Engines to load the export in. Engines that are not installed are reported as not checked."""
    python: PythonConfig = field(default_factory=PythonConfig)
    engine_seconds: Annotated[float, POSITIVE] = 600.0
    """Longest time for an engine to load the export and answer, in seconds."""
