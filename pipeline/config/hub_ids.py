"""How an id on the Hugging Face Hub is told from a path on this machine. This module knows no configuration.

A hub id is `owner/name`, in characters and lengths that huggingface_hub allows. Some data sets have no owner: `squad`.
A path that exists on this machine is never a hub id, and neither is the name of a data file (`chats.jsonl`).
"""

from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".parquet")
"""Suffixes of the data files that the program reads."""


def is_hub_id(path: str | None, needs_owner: bool = True) -> bool:
    """Whether a path is an id on the Hub, by the rule above.

    Args:
        path: of a model or a data set, as the user gave it.
        needs_owner: whether the id must be `owner/name`. Only data sets may be a bare `name`.
    """
    if path is None or (needs_owner and "/" not in path) or Path(path).suffix in DATA_SUFFIXES:
        return False
    return problem(path) is None and not Path(path).exists()


def problem(name: str) -> str | None:
    """Why huggingface_hub does not allow an id, or None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).splitlines()[0]
    return None
