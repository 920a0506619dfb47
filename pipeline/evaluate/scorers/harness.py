"""Run task suites of lm-evaluation-harness (`evaluate.lm_eval`).

Only this module imports lm_eval, which is an optional dependency. A model of the run is passed to the harness in
memory, so the harness measures the model's real forward pass, including fake quantizers. Chat prompts are rendered as
in training (`data.rendering`), with the pinned date and effort. The answer is the text after the last channel's
`<|message|>`. If the model is on a server, the harness sends the requests itself.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.config import EndpointApi, EndpointConfig, LmEvalConfig
from pipeline.data.conversations import Conversation
from pipeline.data.harmony import Rendering, render_prompt
from pipeline.errors import UserError, did_you_mean, user_errors
from pipeline.evaluate.generation.client import read_key
from pipeline.evaluate.generation.endpoint import KEY as ENDPOINT
from pipeline.evaluate.generation.endpoint import Served
from pipeline.evaluate.subject import Subject
from pipeline.runs.artifacts import digests_of

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel

KEY = "evaluate.lm_eval"
_NO_TASK = re.compile(r"(^|/)(\.|__pycache__/)")
_BEFORE_TEXT = "<|message|>"
_ANSWER = "<|channel|>final<|message|>"
"""The beginning of an answer after the prompt, if a task gives its first words."""


class Suites:
    """The tasks that `evaluate.lm_eval.tasks` names."""

    def __init__(self, settings: LmEvalConfig) -> None:
        """Find the tasks.

        Raises:
            UserError: lm-eval is not installed, or a folder or task does not exist.
        """
        try:
            import lm_eval.tasks
        except ModuleNotFoundError as error:
            raise UserError(
                f"{KEY}.tasks={settings.tasks}: needs lm-eval ({error}). Install it: pip install"
                " 'gpt-oss-qat[lm-eval]'."
            ) from error
        path = settings.include_path
        if path is not None and not Path(path).expanduser().is_dir():
            raise UserError(f"{KEY}.include_path={path}: no such folder.")
        self._settings = settings
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager = lm_eval.tasks.TaskManager(include_path=path and str(Path(path).expanduser()))
        unknown = [name for name in settings.tasks if name not in self._manager.all_tasks]
        if unknown:
            raise user_errors(
                [
                    f"{KEY}.tasks: no such task: {name}.{did_you_mean(name, self._manager.all_tasks)}"
                    f" `lm_eval ls tasks` lists all tasks. To use tasks of your own, set {KEY}.include_path=<folder>."
                    for name in unknown
                ]
            )

    def check_data(self) -> None:
        """Load the tasks with their data, as a measurement does. Data that this machine lacks are downloaded.

        Raises:
            UserError: the data of a task are neither on this machine nor reachable.
        """
        with _task_errors(self._settings.tasks):
            self._manager.load(list(self._settings.tasks))

    def own_fingerprint(self) -> str | None:
        """Hash the files in `include_path`, or return None. Hidden files and Python's bytecode do not count."""
        if self._settings.include_path is None:
            return None
        found = digests_of(Path(self._settings.include_path).expanduser())
        own = {name: digest for name, digest in found.items() if not _NO_TASK.search(name)}
        return xxhash.xxh3_128_hexdigest("".join(f"{name}\0{digest}\0" for name, digest in own.items()).encode())

    def score_model(self, model: "PreTrainedModel", rendering: Rendering) -> dict[str, float]:
        """Run the tasks on a loaded model.

        Args:
            model: a causal language model in evaluation mode, on its device.
            rendering: the model's tokenizer and the settings of chat prompts, which are rendered as in training.

        Raises:
            UserError: a task's data cannot be read, or a task does not support the settings.
        """
        from lm_eval.models.huggingface import HFLM

        class Rendered(HFLM):
            """The harness asks this method, which is part of its interface for models, for the text of a chat."""

            def apply_chat_template(
                self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
            ) -> str:
                """Render as in training. Without `add_generation_prompt`, the model continues the last message."""
                messages: Any = chat_history
                *before, last = messages
                if add_generation_prompt:
                    return render_prompt(Conversation(messages), rendering)
                return f"{render_prompt(Conversation(before), rendering)}{_ANSWER}{last['content']}"

        tokenizer = rendering.tokenizer
        harness_model = Rendered(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=self._settings.batch_size,
            think_end_token=tokenizer.convert_tokens_to_ids(_BEFORE_TEXT),
        )
        return self._figures(harness_model, None)

    def score_served(self, served: Served, endpoint: EndpointConfig, tokenizer: Path) -> dict[str, float]:
        """Run the tasks on a served model.

        Args:
            served: the model.
            endpoint: the settings of the model's server.
            tokenizer: the directory of the model's tokenizer. Prompts are sent as tokens, except with the chat API.

        Raises:
            UserError: as for `score_model`, or the server does not answer.
        """
        is_chat = served.api == EndpointApi.chat.name
        key = read_key(endpoint, ENDPOINT)
        arguments: dict[str, object] = {
            "model": served.model,
            "base_url": f"{served.url}/{'chat/' if is_chat else ''}completions",
            "tokenizer_backend": None if is_chat else "huggingface",
            "num_concurrent": endpoint.concurrency,
            "max_retries": endpoint.retries + 1,
            "timeout": endpoint.timeout_seconds,
            "header": {"Authorization": f"Bearer {key}"} if key else {"Accept": "application/json"},
            **({} if is_chat else {"tokenizer": str(tokenizer)}),
        }
        with _server_errors(served):
            return self._figures(f"local-{'chat-' if is_chat else ''}completions", arguments)

    def _figures(self, model: "LM | str", arguments: dict[str, object] | None) -> dict[str, float]:
        from lm_eval.evaluator import simple_evaluate

        settings = self._settings
        with _task_errors(settings.tasks):
            found: Any = simple_evaluate(
                model=model,
                model_args=arguments,
                tasks=list(settings.tasks),
                task_manager=self._manager,
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                log_samples=False,
            )
        return dict(_flatten(found["results"])) | dict(_flatten(found.get("groups", {})))


def score(subject: Subject) -> dict[str, float]:
    """Return the results of the task suites, as `Suites` measured them. Empty if no tasks are configured."""
    return dict(subject.suites)


def _flatten(results: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, float]]:
    """Yield results with their names, `lm_eval/<task>/<metric>` and `lm_eval/<task>/<metric>_stderr`.

    If lm-eval has filtered the answers, ",<filter>" follows the metric.
    """
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, answer_filter = name.partition(",")
            if isinstance(value, (int, float)) and answer_filter:  # skip aliases, "N/A" and counts
                suffix = "" if answer_filter == "none" else f",{answer_filter}"
                yield f"lm_eval/{task}/{metric}{suffix}", float(value)


@contextmanager
def _task_errors(tasks: list[str]) -> Iterator[None]:
    """Turn lm-eval's errors about tasks and their data into a UserError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, FileNotFoundError, ConnectionError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{KEY}.tasks={tasks}: lm-eval cannot run them ({reason}).") from error


@contextmanager
def _server_errors(served: Served) -> Iterator[None]:
    """Turn errors of the connection to a server into a UserError."""
    from aiohttp import ClientError

    try:
        yield
    except (ClientError, OSError, TimeoutError) as error:
        raise UserError(
            f"{ENDPOINT}.url={served.url}: did not answer lm-eval ({str(error).strip() or type(error).__name__})."
            " Is the server up, and does it know the API that evaluate.endpoint.api names?"
        ) from error
