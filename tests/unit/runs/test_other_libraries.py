"""Single lines of other libraries are hidden. All their other lines appear, and so do all errors."""

import logging
import warnings
from collections.abc import Iterator

import pytest

from pipeline.runs import other_libraries
from pipeline.runs.other_libraries import LOGGED, PRINTED, WARNED, hide_printed

HIDDEN = {
    "torchao": "Failed to load /venv/torchao/_C_mxfp8.so: Could not load this library: /venv/torchao/_C_mxfp8.so",
    "torch.utils._pytree": (
        "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch.compile as an opaque"
        " value type."
    ),
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
    "transformers.quantizers.quantizer_mxfp4": (
        "MXFP4 quantization requires the `kernels` package: `pip install kernels>=0.12.0`. We will default to"
        " dequantizing the model to bf16."
    ),
    "mlflow.store.db.utils": "Creating initial MLflow database tables...",
}
"""Name of a logger -> a line that it writes in a run, and that is hidden."""


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def silenced() -> Iterator[None]:
    """Silence the lines. Afterwards, restore the loggers."""
    filters = {each.source: list(logging.getLogger(each.source).filters) for each in LOGGED}
    with warnings.catch_warnings():
        warnings.resetwarnings()
        other_libraries.silence.__wrapped__()
        yield
    for name, before in filters.items():
        logging.getLogger(name).filters[:] = before


def test_every_entry_gives_its_reason() -> None:
    entries = (*LOGGED, *WARNED, *PRINTED)
    assert all(each.reason.endswith(".") and len(each.pattern) > 20 for each in entries)
    assert {each.source for each in LOGGED} == HIDDEN.keys()


@pytest.mark.parametrize(("name", "line"), HIDDEN.items())
@pytest.mark.usefixtures("silenced")
def test_a_logger_loses_one_line_and_keeps_errors_and_all_others(name: str, line: str) -> None:
    records, logger = Records(), logging.getLogger(name)
    logger.addHandler(records)
    try:
        logger.warning(line)
        logger.warning("Another warning")
        logger.error(line)
    finally:
        logger.removeHandler(records)
    assert records.lines == ["Another warning", line]


@pytest.mark.usefixtures("silenced")
def test_two_warnings_are_hidden_and_others_are_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("Distributed training is initialized but no parallel_state is set", UserWarning, stacklevel=1)
        warnings.warn("`torch.distributed._all_gather_base` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(each.message) for each in shown] == ["another"]


def test_printed_lines_of_modelopt_are_hidden_and_others_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with hide_printed():
        print("Inserted 19 quantizers")
        print("Registered <class 'a.b.GptOssAttention'> to _QuantAttention for KV Cache quantization")
        print("Inserted 19 quantizers, but one of them is wrong")
        print("no end of line", end="")
    assert capsys.readouterr().out == "Inserted 19 quantizers, but one of them is wrong\nno end of line"


def test_lines_before_an_error_are_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError), hide_printed():
        print("calibrating", end="")
        raise ValueError
    assert capsys.readouterr().out == "calibrating"
