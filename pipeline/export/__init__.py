"""Checkpoints for serving: one file per row of TARGETS, which writes the layout and says how to read it back.

It must not know how a model was trained: all models are exported alike, weight by weight.
"""

import importlib
from pathlib import Path

from pipeline.checkpoints.reading import TensorFiles
from pipeline.config.targets import TARGETS
from pipeline.errors import UserError
from pipeline.export.exporter import Exporter


def exporters() -> dict[str, Exporter]:
    """The EXPORTER of every target, from `pipeline/export/<name>.py`.

    Raises:
        ImportError: a target has no such file, or the file has no EXPORTER.
    """
    return {name: _exporter(name) for name in TARGETS}


def _exporter(name: str) -> Exporter:
    module = f"{__name__}.{name}"
    where = f"TARGETS has a row {name!r}, but pipeline/export/{name}.py"
    try:
        found = vars(importlib.import_module(module)).get("EXPORTER")
    except ModuleNotFoundError as error:
        if error.name != module:  # the file is there, and imports something that is not
            raise
        raise ImportError(f"{where} does not exist. Add the file, or remove the row.") from error
    if not isinstance(found, Exporter):
        raise ImportError(f"{where} has no EXPORTER. End the file with EXPORTER = Exporter(write=…, …).")
    return found


EXPORTERS = exporters()
"""Exporters by the name of their target."""


def recognized(directory: Path) -> str:
    """The layout of a directory without a record, judged by its tensors' names; mxfp4 if they cannot be read."""
    if any(directory.glob("*.gguf")) and not any(directory.glob("*.safetensors")):
        return "gguf"
    try:
        names = TensorFiles(directory).tensors
    except UserError:
        return "mxfp4"
    marked = (name for name, each in EXPORTERS.items() if each.mark and any(each.mark in tensor for tensor in names))
    return next(marked, "bf16")
