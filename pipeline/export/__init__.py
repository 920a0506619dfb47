"""Writes checkpoints for serving. Each target in TARGETS has one file here, which writes and reads the target's layout.

This package must not depend on how a model was trained. The weights of every model are exported in the same way.
"""

import importlib
from pathlib import Path

from pipeline.checkpoints.reading import TensorFiles
from pipeline.config.targets import TARGETS
from pipeline.errors import UserError
from pipeline.export.exporter import Exporter


def import_exporters() -> dict[str, Exporter]:
    """Import the EXPORTER of every target from `pipeline/export/<target>.py`.

    Raises:
        ImportError: the file of a target is missing, or it has no EXPORTER.
    """
    return {name: _import_exporter(name) for name in TARGETS}


def _import_exporter(name: str) -> Exporter:
    module = f"{__name__}.{name}"
    where = f"TARGETS has a row {name!r}, but pipeline/export/{name}.py"
    try:
        found = vars(importlib.import_module(module)).get("EXPORTER")
    except ModuleNotFoundError as error:
        if error.name != module:  # the file exists, but one of its own imports failed
            raise
        raise ImportError(f"{where} does not exist. Add the file, or remove the row.") from error
    if not isinstance(found, Exporter):
        raise ImportError(f"{where} has no EXPORTER. End the file with EXPORTER = Exporter(write=…, …).")
    return found


EXPORTERS = import_exporters()
"""Target -> its exporter."""


def recognize(directory: Path) -> str:
    """Identify the layout of a directory by its tensor names. Return mxfp4 if the directory cannot be read."""
    if any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors")):
        return "gguf"
    try:
        names = TensorFiles(directory).tensors
    except UserError:
        return "mxfp4"
    marked = (name for name, each in EXPORTERS.items() if each.mark and any(each.mark in tensor for tensor in names))
    return next(marked, "bf16")
