"""Fine-tune gpt-oss with quantization-aware training, and export it in the MXFP4 layout of the released model."""

__version__ = "0.1.0"

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.errors import CheckFailed, MachineError, UserError
    from pipeline.library.checkpoints import export_checkpoint, read_tensors, verify_checkpoint
    from pipeline.library.running import run
    from pipeline.numerics.codec import decode, encode
    from pipeline.numerics.formats import FORMATS
    from pipeline.runs.artifacts import Artifact
    from pipeline.verify.check import Check

__all__ = [
    "FORMATS",
    "Artifact",
    "Check",
    "CheckFailed",
    "MachineError",
    "UserError",
    "decode",
    "encode",
    "export_checkpoint",
    "read_tensors",
    "run",
    "verify_checkpoint",
]
_HOMES = {
    "pipeline.errors": ("CheckFailed", "MachineError", "UserError"),
    "pipeline.library.checkpoints": ("export_checkpoint", "read_tensors", "verify_checkpoint"),
    "pipeline.library.running": ("run",),
    "pipeline.numerics.codec": ("decode", "encode"),
    "pipeline.numerics.formats": ("FORMATS",),
    "pipeline.runs.artifacts": ("Artifact",),
    "pipeline.verify.check": ("Check",),
}
"""Module -> the public names that it defines. It is imported when one of them is first used."""

# libgomp's threads spin for milliseconds while they wait for each other.
# Spinning makes arithmetic up to five times slower if there are more busy threads than cores. One extra is enough.
# This is common: conversions read, hash and write in parallel, and other users run programs.
# But threads that never spin make short loops a fifth slower. So threads spin here for about 50 microseconds.
# torch reads the variables when it is loaded, so they must be set before that.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"  # for other OpenMP libraries
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> object:
    """Import a public name from its module. So `import pipeline` loads nothing, and torch only comes with its users."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """List the public names too, for completion in notebooks."""
    return sorted({*globals(), *__all__})
