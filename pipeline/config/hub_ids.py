"""Distinguish ids on the Hugging Face Hub from paths on this machine. This module does not depend on the configuration.

A hub id is `owner/name`, with characters and a length that huggingface_hub allows. Some data sets have no owner, such
as `squad`. An existing path on this machine is not a hub id. The name of a data file (`chats.jsonl`) is not one either.
"""

from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of the data files that the program reads."""


def is_hub_id(path: str | None, needs_owner: bool = True) -> bool:
    """Return whether a path is an id on the Hub, by the rule above.

    Args:
        path: path or id of a model or a data set, as the user gave it.
        needs_owner: whether the id must be `owner/name`. Only data sets have ids without an owner.
    """
    if path is None or (needs_owner and "/" not in path) or Path(path).suffix in DATA_SUFFIXES:
        return False
    return problem(path) is None and not Path(path).exists()


def problem(name: str) -> str | None:
    """Return the reason why huggingface_hub refuses an id, or None if the id is allowed."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error).splitlines()[0]
    return None
