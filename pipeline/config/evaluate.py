"""`evaluate`: the measurement of models."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Optional

from pipeline.config.bounds import ABOVE_0_UP_TO_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, SEED
from pipeline.config.data import ColumnsConfig


class EndpointApi(Enum):
    """APIs of a server: the rows of generation.endpoint.APIS."""

    completions = "completions"
    chat = "chat"


@dataclass
class PromptsConfig:
    """The prompts that models answer. Without a path, they are the validation rows of `data`."""

    path: Optional[str] = None
    """Another data set, as data.path. Its rows need no answers. null: the validation rows of `data`."""
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
    """Facts that scorers need, and the column of each: {category: topic}. `language` needs no column."""
    expected_of_all: dict[str, str] = field(default_factory=dict)
    """Facts that hold for every prompt and have no column: {safety: safe}."""
    max_samples: Annotated[Optional[int], POSITIVE] = None
    """Ask only this many prompts, drawn with data.seed; null: all."""


@dataclass
class GenerationConfig:
    """The generation of answers."""

    max_new_tokens: Annotated[int, POSITIVE] = 512
    """Longest answer in tokens, reasoning included."""
    temperature: Annotated[float, NOT_NEGATIVE] = 0.0
    """Sampling temperature, by which the logits are divided; 0: always the likeliest token."""
    top_p: Annotated[float, ABOVE_0_UP_TO_1] = 1.0
    """Sample only among the likeliest tokens whose probabilities add up to this value."""
    samples: Annotated[int, POSITIVE] = 1
    """Answers to each prompt."""
    seed: Annotated[int, SEED] = 42
    """Seed of the sampling. The seed, the prompt and the sample's number determine an answer."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Answers generated at once. An endpoint uses evaluate.endpoint.concurrency instead."""


@dataclass
class ServerConfig:
    """A server with OpenAI's API, and the limits of its requests."""

    url: Optional[str] = None
    """Address, as OpenAI's clients take it: http://localhost:8000/v1; null: no server."""
    model: Optional[str] = None
    """Model to request; null: the only model of the server."""
    api_key_env: Optional[str] = None
    """Environment variable that holds the key. The key is neither shown nor saved. null: no key is sent."""
    concurrency: Annotated[int, POSITIVE] = 16
    """Requests at a time."""
    retries: Annotated[int, NOT_NEGATIVE] = 5
    """Retries after no answer, 429 or 5xx. The delays are 0.5 s, 1 s, 2 s, …, or what the server requests."""
    timeout_seconds: Annotated[float, POSITIVE] = 600.0
    """Timeout of a request, in seconds."""


@dataclass
class EndpointConfig(ServerConfig):
    """A server (vLLM, SGLang, TensorRT-LLM) whose model is measured; without evaluate.source, only that model is."""

    name: str = "endpoint"
    """Name of its model in the results."""
    api: EndpointApi = EndpointApi.completions
    """completions: sends tokens, as in training (model.path's tokenizer); chat: the server renders the messages."""


@dataclass
class JudgeConfig(ServerConfig):
    """A model on a server that rates how far each answer refuses, for prompts with a known `safety`."""

    max_new_tokens: Annotated[int, POSITIVE] = 1024
    """Longest verdict in tokens, reasoning included."""
    attempts: Annotated[int, POSITIVE] = 3
    """Attempts to get a well-formed verdict. Retries restate the required form."""
    max_without_verdict: Annotated[float, FROM_0_TO_1] = 0.1
    """Largest share of answers that may have no verdict. A larger share is an error."""


@dataclass
class LmEvalConfig:
    """Task suites of lm-evaluation-harness; needs pip install 'gpt-oss-qat[lm-eval]'."""

    tasks: list[str] = field(default_factory=list)
    """Names of its tasks or groups of tasks; empty: none."""
    include_path: Optional[str] = None
    """Folder with your own task files."""
    num_fewshot: Annotated[Optional[int], NOT_NEGATIVE] = None
    """Examples before each question; null: the task's default."""
    limit: Annotated[Optional[int], POSITIVE] = None
    """Use only this many questions of each task, the first ones, for a trial; null: all."""
    batch_size: Annotated[int, POSITIVE] = 8
    """Questions at a time. An endpoint uses evaluate.endpoint.concurrency instead."""
    apply_chat_template: bool = False
    """Ask through the chat template. Tasks with free-text answers need it: gpt-oss does badly on them without it."""


@dataclass
class DuringTrainingConfig:
    """Answers of the model in training at each validation, written to samples.jsonl."""

    prompts: Annotated[int, NOT_NEGATIVE] = 0
    """Number of evaluate.prompts to answer; 0: none."""
    max_new_tokens: Annotated[int, POSITIVE] = 128
    """Longest of these answers, in tokens. They always take the likeliest token."""


@dataclass
class EvaluateConfig:
    """Measure models."""

    source: Optional[str] = None
    """Model to measure: a stage of this run, a checkpoint directory, or all (all stages); null: the run's newest."""
    max_samples: Annotated[Optional[int], POSITIVE] = None
    """Use only this many validation examples; null: all."""
    batch_size: Annotated[int, POSITIVE] = 4
    """Examples per forward pass."""
    group_column: Optional[str] = None
    """Column of `data` by whose values the loss is also reported; null: the reasoning language, if rows have one."""
    generate: bool = False
    """Let models also answer prompts. Answers are stored in evaluate/<model>/generations.jsonl."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    during_training: DuringTrainingConfig = field(default_factory=DuringTrainingConfig)
