"""Check the name of a repository on the Hub and the login. The Hub is not contacted."""

from pipeline.config import ExportConfig, hub_ids

LOGIN = "Log in with `hf auth login`, or put a token with write access into the environment variable HF_TOKEN."


def problems(settings: ExportConfig) -> list[str]:
    """Return a message for a name that is not valid, and for a missing token. The Hub is not contacted."""
    from huggingface_hub import get_token

    name = settings.push_to_hub
    if name is None:
        return []
    found = _name_problems(name)
    if get_token() is None:
        found.append(f"{setting(name)}: there is no token for the Hub. {LOGIN}")
    return found


def _name_problems(name: str) -> list[str]:
    # If a name has no owner, the Hub would add the token's owner. The card and `check` do not know this owner.
    if "/" not in name:
        return [f"{setting(name)}: has no owner. Write <your name>/{name}."]
    problem = hub_ids.problem(name)
    return [] if problem is None else [f"{setting(name)}: {problem}"]


def setting(name: str) -> str:
    """Return the setting as messages show it."""
    return f"export.push_to_hub={'true' if name == 'True' else name}"  # OmegaConf makes text of true
