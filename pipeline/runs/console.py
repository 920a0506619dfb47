"""Lines, warnings and progress bars on the terminal. Only the main process prints."""

import codecs
import io
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

from pipeline.config.secrets import without_secrets
from pipeline.runs.processes import is_main_process

if TYPE_CHECKING:
    from tqdm import tqdm


_PLAIN = str.maketrans({"…": "...", "→": "->", "–": "-", "—": "-", "×": "x", "·": "-", "≥": ">="})
_ERRORS = "plain_text"


def let_streams_print() -> None:
    """Let stdout and stderr print every text, whatever their encoding is.

    A character that the encoding lacks is replaced by a similar one, or by its escape, as in \\xe9. The name of a file
    may have bytes that are no text at all. Without this, such a character would end the command with a traceback.
    """
    codecs.register_error(_ERRORS, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of the characters that an encoding lacks, and the position after them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_PLAIN)
    return lacking.encode("ascii", "backslashreplace").decode("ascii"), error.end


def say(stage: str, message: str) -> None:
    """Print a line."""
    if is_main_process():
        _write_line(f"[{stage}] {message}", sys.stdout)


def note(stage: str, message: str) -> None:
    """Print a line about the progress of the command on stderr. Scripts that read stdout do not get it."""
    if is_main_process():
        _write_line(f"[{stage}] {message}", sys.stderr)


def warn(stage: str, message: str) -> None:
    """Print a warning, on stderr."""
    if is_main_process():
        _write_line(f"[{stage}] warning: {message}", sys.stderr)


def show_page(text: str) -> None:
    """Print a text. On a terminal, a text that is longer than the window is shown in the user's pager."""
    if not is_main_process():
        return
    if sys.stdout.isatty() and text.count("\n") >= os.get_terminal_size().lines:
        from pydoc import pager

        os.environ.setdefault("LESS", "FRX")
        pager(text)
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again when it exits


def _write_line(line: str, file: TextIO) -> None:
    line = without_secrets(line)
    if not shows_progress():
        print(line, file=file, flush=True)
        return
    from tqdm.auto import tqdm

    with tqdm.external_write_mode(file=file):  # clears the progress bar, and draws it again below the line
        print(line, file=file, flush=True)


def progress(
    items: Iterable | None = None, total: int | None = None, what: str = "", unit: str = "it", done: int = 0
) -> "tqdm":
    """Show a progress bar, but only on the main process, and only on a terminal."""
    from tqdm.auto import tqdm

    scaled = unit == "B"
    return tqdm(items, total=total, desc=what, unit=unit, unit_scale=scaled, initial=done, disable=not shows_progress())


def shows_progress() -> bool:
    """Whether to show progress bars: only on the main process, and only on a terminal."""
    return is_main_process() and sys.stderr.isatty()
