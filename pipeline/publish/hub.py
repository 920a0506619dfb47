"""Upload to the Hugging Face Hub.

huggingface_hub finds the token. This program never reads, stores or logs the token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from pipeline.config import ExportConfig
from pipeline.errors import UserError, user_errors
from pipeline.runs.hub_login import LOGIN, problems, setting
from pipeline.runs.processes import is_main_process


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
        raise UserError(f"{setting(name)}: is public. Make it private, choose another, or set export.private=false.")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    # huggingface_hub raises ValueError if a file is too large, or if the Hub refuses the card's metadata.
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{setting(name)}: the Hub cannot be reached or refuses ({reason}). {LOGIN}") from error
