"""Settings of `evaluate`: the measurement of models."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Optional

from pipeline.config.bounds import ABOVE_0_UP_TO_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, SEED
from pipeline.config.data import ColumnsConfig


class EndpointApi(Enum):
    """API to use on a server: a key of APIS in pipeline/evaluate/generation/endpoint.py."""

    completions = "completions"
    chat = "chat"


class InstructionsRole(Enum):
    """Role of the instructions in a request to OpenAI's chat API."""

    developer = "developer"
    system = "system"


@dataclass
class PromptsConfig:
    """The prompts that models answer. If `path` is null, the prompts are the validation rows of `data`."""

    path: Optional[str] = None
    """Another data set, given as in data.path. Rows need no answers. null: use the validation rows of `data`."""
    revision: Optional[str] = None
    """As data.revision."""
    split: str = "train"
    """As data.split."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    roles: dict[str, str] = field(default_factory=dict)
    """As data.roles."""
    filter: dict[str, list[Any]] = field(default_factory=dict)
    """As data.filter."""
    expected: dict[str, str] = field(default_factory=dict)
    """Columns with facts for scorers. {category: topic}: column topic holds the category. `language` needs none."""
    expected_of_all: dict[str, str] = field(default_factory=dict)
    """Facts for scorers, with one value for all prompts. {safety: safe} says that every prompt is safe."""
    max_samples: Annotated[Optional[int], POSITIVE] = None
    """Ask only this many prompts, drawn with data.seed; null: all."""


@dataclass
class GenerationConfig:
    """How models generate answers."""

    max_new_tokens: Annotated[int, POSITIVE] = 512
    """Largest length of an answer in tokens, including the reasoning."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """Sampling temperature, which divides the logits; 0: always choose the likeliest token."""
    top_p: Annotated[float, ABOVE_0_UP_TO_1] = 1.0
    """Nucleus sampling: sample from the likeliest tokens that together reach this probability; 1: from all tokens."""
    samples: Annotated[int, POSITIVE] = 1
    """Number of answers to each prompt."""
    seed: Annotated[int, SEED] = 42
    """Random seed of the sampling. This seed, the prompt and the sample number determine an answer."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Number of answers to generate in a batch. An endpoint uses evaluate.endpoint.concurrency instead."""


@dataclass
class ServerConfig:
    """A server with OpenAI's API, and limits for the requests to it."""

    url: Optional[str] = None
    """Base URL, as for OpenAI's clients: http://localhost:8000/v1; null: no server."""
    model: Optional[str] = None
    """Name of the model to request; null: the only model on the server."""
    api_key_env: Optional[str] = None
    """Environment variable that holds the API key. The key is never shown or saved. null: send no key."""
    concurrency: Annotated[int, POSITIVE] = 16
    """Number of requests to run in parallel."""
    retries: Annotated[int, NOT_NEGATIVE] = 5
    """Number of retries after a failure (no answer, 429 or 5xx). Delays: 0.5 s, 1 s, 2 s, … or as the server asks."""
    timeout_seconds: Annotated[float, POSITIVE] = 600.0
    """Timeout of a request, in seconds."""


@dataclass
class EndpointConfig(ServerConfig):
    """A server (vLLM, SGLang, TensorRT-LLM) whose model is measured. To measure more models, set evaluate.source."""

    name: str = "endpoint"
    """Name of the server's model in the results."""
    api: EndpointApi = EndpointApi.completions
    """completions: send tokens, made with model.path's tokenizer; chat: send messages, which the server renders."""
    instructions_role: InstructionsRole = InstructionsRole.developer
    """Role of instructions with api=chat. developer suits gpt-oss; system: for servers that do not know developer."""


@dataclass
class JudgeConfig(ServerConfig):
    """A model on a server. It judges whether answers are refusals, but only for prompts with a known `safety`."""

    instructions_role: InstructionsRole = InstructionsRole.system
    """Role of the judge's instructions. Set developer for a gpt-oss on TensorRT-LLM; other models know system."""
    max_new_tokens: Annotated[int, POSITIVE] = 1024
    """Largest length of a verdict in tokens, including the reasoning."""
    attempts: Annotated[int, POSITIVE] = 3
    """Number of attempts to get a well-formed verdict. Each retry tells the judge the required format again."""
    max_without_verdict: Annotated[float, FROM_0_TO_1] = 0.1
    """Largest allowed share of answers without a verdict. A larger share is an error."""


@dataclass
class LmEvalConfig:
    """Task suites of lm-evaluation-harness. They need pip install 'gpt-oss-qat[lm-eval]'."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks or task groups in lm-evaluation-harness; empty: none."""
    include_path: Optional[str] = None
    """Folder with your own task files."""
    num_fewshot: Annotated[Optional[int], NOT_NEGATIVE] = None
    """Number of solved examples before each question; null: the task's default."""
    limit: Annotated[Optional[int], POSITIVE] = None
    """Number of questions of each task to ask, starting with the first. For trials; null: all."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Number of questions in a batch. An endpoint uses evaluate.endpoint.concurrency instead."""
    apply_chat_template: bool = False
    """Apply the chat template to questions. Without it, gpt-oss does badly on tasks with free-text answers."""


@dataclass
class DuringTrainingConfig:
    """During training, let the model answer prompts at each validation. The answers go to samples.jsonl."""

    prompts: Annotated[int, NOT_NEGATIVE] = 0
    """How many prompts of evaluate.prompts the model answers; 0: none."""
    max_new_tokens: Annotated[int, POSITIVE] = 128
    """Largest length of such an answer in tokens. Decoding is greedy: each token is the likeliest one."""


@dataclass
class EvaluateConfig:
    """Measure the loss of models, and optionally their answers and task scores."""

    source: Optional[str] = None
    """Model to measure: a stage, export/<target>, a control (controls/…), a directory, or all; null: newest stage."""
    max_samples: Annotated[Optional[int], POSITIVE] = None
    """Use only this many validation examples; null: all."""
    batch_size: Annotated[int, POSITIVE] = 4
    """Number of examples per forward pass."""
    group_column: Optional[str] = None
    """Column of `data`. The loss is also reported for each of its values; null: for each reasoning language."""
    generate: bool = False
    """Let models also answer prompts. The answers go to evaluate/<model>/generations.jsonl."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    during_training: DuringTrainingConfig = field(default_factory=DuringTrainingConfig)
