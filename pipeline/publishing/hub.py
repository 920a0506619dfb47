"""Upload to the Hugging Face Hub. Tokens are huggingface_hub's affair: they are in no configuration and no log."""

from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline.config import PublishConfig
from pipeline.errors import UserError

_LOGIN = "Log in with `hf auth login`, or put a token with the right to write into the environment variable HF_TOKEN."


def check(settings: PublishConfig) -> None:
    """Find what would stop an upload before there is anything to upload.

    Raises:
        UserError: the name is none, or there is no token.
    """
    key = f"publish.push_to_hub={settings.push_to_hub}"
    try:
        validate_repo_id(str(settings.push_to_hub))
    except HFValidationError as error:
        raise UserError(f"{key}: {str(error).splitlines()[0]}") from error
    if get_token() is None:
        raise UserError(f"{key}: there is no token for the Hub. {_LOGIN}")


def push(settings: PublishConfig, directory: Path) -> str:
    """Make a repository hold the files of a directory, by one commit; its address.

    What else the repository had is deleted: a shard of an earlier export would be taken for a part of this one.

    Raises:
        UserError: the Hub refuses or cannot be reached; the repository is public, and it should not be.
    """
    name, api = str(settings.push_to_hub), HfApi()
    try:
        repository = api.create_repo(name, private=settings.private, exist_ok=True)
        if settings.private and not api.model_info(repository.repo_id).private:
            raise UserError(
                f"publish.push_to_hub={name}: is public. Make it private, choose another, or set publish.private=false."
            )
        made = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=directory,
            commit_message="Add the exported model and its card",
            delete_patterns="*",
        )
        return made.commit_url
    # The Hub's own errors are of the first two kinds; ValueError: it refuses the card's metadata, or a large file.
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"publish.push_to_hub={name}: the Hub was not reached, or refused ({reason}). {_LOGIN}"
        ) from error
