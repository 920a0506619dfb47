"""Check the settings of `evaluate` against each other: prompts, answers, servers, judge and task suites."""

import re
from urllib.parse import urlsplit

from pipeline.config.evaluate import EndpointApi, EndpointConfig, EvaluateConfig, PromptsConfig, ServerConfig
from pipeline.config.pipeline import Stage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def problems(evaluate: EvaluateConfig) -> list[str]:
    """Return a message for each rule that these settings break, with full keys and values."""
    found = _prompts_problems(evaluate.prompts) + _endpoint_problems(evaluate.endpoint)
    found += _server_problems("evaluate.judge", evaluate.judge) + _lm_eval_problems(evaluate)
    generation = evaluate.generation
    if generation.samples > 1 and generation.temperature == 0:
        found.append(
            f"evaluate.generation.samples={generation.samples}: all answers to a prompt are the same, because"
            " evaluate.generation.temperature=0. Raise the temperature, or set evaluate.generation.samples=1."
        )
    if evaluate.endpoint.url is not None and not evaluate.generate and not evaluate.lm_eval.tasks:
        found.append(
            f"evaluate.endpoint.url={evaluate.endpoint.url}: unused with evaluate.generate=false."
            " Add eval=quick or eval=full."
        )
    if evaluate.judge.url is not None and not evaluate.generate:
        found.append(
            f"evaluate.judge.url={evaluate.judge.url}: there are no answers to judge, because evaluate.generate=false."
            " Add eval=quick or eval=full."
        )
    return found


def _prompts_problems(prompts: PromptsConfig) -> list[str]:
    key = "evaluate.prompts"
    if prompts.path is not None:
        columns = prompts.columns
        if (columns.messages is None) == (columns.prompt is None):
            return [
                f"{key}.columns: messages={columns.messages!r} and prompt={columns.prompt!r} cannot go together."
                " Name one of the columns, and set the other to null."
            ]
        return []
    usual = PromptsConfig()
    return [
        f"{key}.{name}={getattr(prompts, name)!r}: applies only to {key}.path, which is not set. Therefore"
        f" the prompts are the validation rows of data. Set data.{name} instead."
        for name in ("revision", "split", "columns", "roles", "filter")
        if getattr(prompts, name) != getattr(usual, name)
    ]


def _endpoint_problems(endpoint: EndpointConfig) -> list[str]:
    found = _server_problems("evaluate.endpoint", endpoint)
    if endpoint.name and (endpoint.name in Stage.__members__ or not _NAME.fullmatch(endpoint.name)):
        found.append(
            f"evaluate.endpoint.name={endpoint.name!r}: must be letters, digits, '.', '_' and '-'. It must not be a"
            " stage's name."
        )
    return found


def _server_problems(key: str, server: ServerConfig) -> list[str]:
    if server.url is not None and "@" in server.url:
        return [
            f"{key}.url: contains a user name or a password, which would be saved with the run. Put the key into"
            f" an environment variable, and set {key}.api_key_env=<its name>."
        ]
    if server.url and not _is_address(server.url):  # an empty text is another problem
        return [f"{key}.url={server.url!r}: must be like http://localhost:8000/v1."]
    return []


def _lm_eval_problems(evaluate: EvaluateConfig) -> list[str]:
    """Check that the harness uses the chat template with the chat API, and only with this API.

    The harness can send only messages to the chat API. For the completions API it would render the chat template
    itself, with today's date.
    """
    is_chat = evaluate.endpoint.api is EndpointApi.chat
    if evaluate.lm_eval.tasks and evaluate.endpoint.url is not None and evaluate.lm_eval.apply_chat_template != is_chat:
        return [
            f"evaluate.lm_eval.apply_chat_template={str(not is_chat).lower()}: not with evaluate.endpoint.api="
            f"{evaluate.endpoint.api.name}. The template needs api=chat, and plain text needs api=completions."
        ]
    return []


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        has_host = bool(url.hostname) and url.port != 0
    except ValueError:  # the port is not a number, or a bracket is not closed
        return False
    return url.scheme in ("http", "https") and has_host and not url.query and not url.fragment
