"""Upload to the Hugging Face Hub.

huggingface_hub finds the token. This program never reads, stores or logs the token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from pipeline.config import ExportConfig, hub_ids
from pipeline.errors import UserError, user_errors
from pipeline.runs.processes import is_main_process

_LOGIN = "Log in with `hf auth login`, or put a token with write access into the environment variable HF_TOKEN."


def check(settings: ExportConfig) -> None:
    """Check early that an upload can work.

    The token's write access is not checked, because only the upload itself shows whether the token has it.

    Raises:
        UserError: the name is not valid, the token is missing or wrong, the Hub cannot be reached, or the repository is
            public although export.private=true.
    """
    if settings.push_to_hub is None or not is_main_process():
        return
    if found := problems(settings):
        raise user_errors(found)
    name = settings.push_to_hub
    with _hub_errors(name):
        _raise_if_public(settings, HfApi(), name)


def problems(settings: ExportConfig) -> list[str]:
    """Return a message for a name that is not valid, and for a missing token. The Hub is not contacted."""
    name = settings.push_to_hub
    if name is None:
        return []
    found = _name_problems(name)
    if get_token() is None:
        found.append(f"{_setting(name)}: there is no token for the Hub. {_LOGIN}")
    return found


def _name_problems(name: str) -> list[str]:
    # If a name has no owner, the Hub would add the token's owner. The card and `check` do not know this owner.
    if "/" not in name:
        return [f"{_setting(name)}: has no owner. Write <your name>/{name}."]
    problem = hub_ids.problem(name)
    return [] if problem is None else [f"{_setting(name)}: {problem}"]


def push(settings: ExportConfig, directory: Path) -> str:
    """Upload a directory to a repository in one commit, and return the commit's address.

    All other files in the repository are deleted. Otherwise a shard of an earlier export would seem to be part of this
    export.

    Raises:
        UserError: the Hub cannot be reached or refuses the upload, or the repository is public although
            export.private=true.
    """
    name, api = str(settings.push_to_hub), HfApi()
    with _hub_errors(name):
        repository = api.create_repo(name, private=settings.private, exist_ok=True)
        _raise_if_public(settings, api, repository.repo_id)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=directory,
            commit_message="Add the exported model and its card",
            delete_patterns="*",
        )
        return commit.commit_url


def _raise_if_public(settings: ExportConfig, api: HfApi, name: str) -> None:
    try:
        is_private = api.model_info(name).private
    except RepositoryNotFoundError:
        return  # `push` creates the repository
    if settings.private and not is_private:
        raise UserError(f"{_setting(name)}: is public. Make it private, choose another, or set export.private=false.")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    # huggingface_hub raises ValueError if a file is too large, or if the Hub refuses the card's metadata.
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{_setting(name)}: the Hub cannot be reached or refuses ({reason}). {_LOGIN}") from error


def _setting(name: str) -> str:
    return f"export.push_to_hub={name}"
