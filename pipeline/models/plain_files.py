"""Reads files of torch.save that hold plain tensors. Such a file is a pickle, and other pickles can run code."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipeline.errors import UserError

Content = TypeVar("Content")


def read_plain(path: Path, load: Callable[[], Content], kind: str, remedy: str) -> Content:
    """Call a function that loads a file with `weights_only=True`, and describe its failure.

    PyTorch's own messages advise to load the file with its code, and to report an issue. So they are not shown.

    Args:
        path: the file, for messages.
        load: the function.
        kind: what the file should be, for messages.
        remedy: sentence that says what to do about an unreadable file.

    Raises:
        UserError: the file is damaged, or is a pickle that could run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return load()
    except pickle.UnpicklingError as error:
        reason = "it is a pickle with code, which is not loaded, or it is damaged"
        raise UserError(f"{path}: not {kind} ({reason}). {remedy}") from error
    except Exception as error:  # a damaged file raises any kind of error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not {kind} ({reason:.200}). {remedy}") from error
