"""Silence single lines of other libraries that would bury ours. This is the only place that hides such lines.

Each entry hides exactly one message, and gives the reason why nothing is lost. Errors and all other lines of a library
stay. Libraries are not imported here: the filters work whenever a library is imported later.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import TextIOBase
from typing import TextIO


@dataclass(frozen=True)
class Silenced:
    """A line that is hidden.

    Attributes:
        source: name of the logger. For Python warnings, the name of their category. For printed lines, the library.
        pattern: regular expression that matches from the beginning of the line.
        reason: why nothing is lost.
    """

    source: str
    pattern: str
    reason: str


LOGGED = (
    Silenced(
        "torchao",
        r"Failed to load \S+\.so: ",
        "torchao 0.18 tries to load its kernels for other builds of torch too. Its optimizers need none of them.",
    ),
    Silenced(
        "torch.utils._pytree",
        r"<enum '\w+'> is an Enum subclass and is now natively supported",
        "torchao 0.18 registers its enums in a way that torch 2.13 does not need any more.",
    ),
    Silenced(
        "DeepSpeed",
        "Setting accelerator to CPU. If you have GPU",
        "DeepSpeed is also imported if sharding=none. `doctor` says whether there is a GPU.",
    ),
    Silenced(
        "transformers.quantizers.quantizer_mxfp4",
        r".*(default to dequantizing|dequantize) the model to bf16",
        "transformers warns that it decodes MXFP4 weights, for lack of kernels. Decoding is what the program asks for.",
    ),
    Silenced(
        "mlflow.store.db.utils",
        "Creating initial MLflow database tables|Updating database tables",
        "mlflow 3.17 says how it makes the database of a new run. Failures raise an error.",
    ),
)
"""Lines that libraries write with Python's logging."""

WARNED = (
    Silenced(
        "FutureWarning",
        r"`torch\.distributed\.\w+` is deprecated",
        "DeepSpeed 0.19 calls collectives by deprecated names, and torch warns at every step.",
    ),
    Silenced(
        "Warning",
        r"IProgress not found\. Please update jupyter",
        "In a notebook without ipywidgets, tqdm cannot draw its bars. The program shows none outside of a terminal.",
    ),
    Silenced(
        "UserWarning",
        "Distributed training is initialized but no parallel_state",
        "ModelOpt warns once for each type of module. The warning is about tensor parallelism, which is not used here.",
    ),
    Silenced(
        "UserWarning",
        r"torch\.distributed is disabled, unavailable or uninitialized",
        "torch 2.13 warns if a single process saves or loads the state of held weights. This is intended.",
    ),
)
"""Python warnings."""

_CATEGORIES: dict[str, type[Warning]] = {
    "FutureWarning": FutureWarning,
    "UserWarning": UserWarning,
    "Warning": Warning,
}

PRINTED = (
    Silenced("modelopt", r"Inserted \d+ quantizers$", "`quantize` says how many quantizers are enabled."),
    Silenced(
        "modelopt",
        r"Registered <class '[\w.]+'> to \w+ for KV Cache quantization$",
        "The KV cache is never quantized here. ModelOpt's quantizers of it stay disabled.",
    ),
)
"""Lines that ModelOpt 0.47 prints without a logger. `hide_printed` hides them."""


@cache
def silence() -> None:
    """Hide the lines in LOGGED and WARNED from now on. Call this before libraries are imported.

    mlflow is also kept from sending statistics of its use to its authors, unless the user has set the variable. mlflow
    3.17 reads it on import, and DeepSpeed 0.19 imports mlflow.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for each in LOGGED:
        logging.getLogger(each.source).addFilter(_Unless(each.pattern))
    for each in WARNED:
        warnings.filterwarnings("ignore", message=each.pattern, category=_CATEGORIES[each.source])


class _Unless(logging.Filter):
    """Drops records below the level of errors whose message matches."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is kept."""
        return record.levelno >= logging.ERROR or not self._pattern.match(record.getMessage())


@contextmanager
def hide_printed() -> Iterator[None]:
    """Hide the lines in PRINTED that the block prints. All other lines appear at once."""
    output = _Lines(sys.stdout, [re.compile(each.pattern) for each in PRINTED])
    try:
        with redirect_stdout(output):
            yield
    finally:
        output.finish()


class _Lines(TextIOBase):
    """Passes whole lines on, except those that match."""

    def __init__(self, target: TextIO, hidden: list[re.Pattern[str]]) -> None:
        self._target, self._hidden, self._begun = target, hidden, ""

    def write(self, text: str) -> int:
        """Write the lines that are complete, and keep the rest."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if not any(pattern.match(line) for pattern in self._hidden):
                self._target.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Flush the lines that were passed on."""
        self._target.flush()

    def isatty(self) -> bool:
        """Return whether the lines go to a terminal."""
        return self._target.isatty()

    def finish(self) -> None:
        """Write the rest, which has no end of line."""
        self._target.write(self._begun)
        self._begun = ""
