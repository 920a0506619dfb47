"""Prompts for evaluation: the conversations of a data set, each without its last answer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import xxhash

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.config import PipelineConfig
from pipeline.data import harmony, sampling
from pipeline.data.examples import split_rows
from pipeline.data.harmony import Conversation, ConversationError, Rendering
from pipeline.data.rows import Conversations, Rows, read_rows
from pipeline.data.sources import Source, data_sources
from pipeline.errors import Problems
from pipeline.evaluate.transcripts import Transcript, parse
from pipeline.runs.console import say

_SEEDS = 2**31  # every server accepts seeds below this


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: hash of its contents and expected values, the same in every run.
        conversation: up to the answer, with its reasoning effort and reasoning language.
        expected: values for scorers; with `language` if the prompt asks for one.
    """

    prompt_id: str
    conversation: Conversation
    expected: dict[str, str]


class Question(NamedTuple):
    """A prompt to be answered once. Each of several samples is a question of its own."""

    prompt: Prompt
    sample: int

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the question within an evaluation."""
        return self.prompt.prompt_id, self.sample

    def seed(self, seed: int) -> int:
        """Seed for sampling this answer. It does not depend on the other questions."""
        return xxhash.xxh3_64_intdigest(f"{seed}/{self.prompt.prompt_id}/{self.sample}".encode()) % _SEEDS

    def transcript(self, completion: str, finish: str, tokens: int, seed: int | None) -> Transcript:
        """The transcript of a generated answer.

        Args:
            completion: the text after `<|start|>assistant`, special tokens included.
            finish: why generation ended; a stop token at the end takes precedence.
            tokens: number of generated tokens.
            seed: that the answer was sampled with, or None.
        """
        found = parse(completion)
        ended_by = next((token for token in STOP_TOKENS if completion.endswith(token)), None)
        return Transcript(
            prompt_id=self.prompt.prompt_id,
            sample=self.sample,
            messages=self.prompt.conversation.messages,
            expected=self.prompt.expected,
            reasoning=found.reasoning,
            answer=found.answer,
            completion=completion,
            finish=finish if ended_by is None else ended_by.strip("<|>"),
            tokens=tokens,
            seed=seed,
            tool_calls=found.tool_calls,
        )


def load(config: PipelineConfig, rows: Rows, most: int | None = None) -> list[Prompt]:
    """The distinct prompts that `evaluate.prompts` names.

    Args:
        config: the resolved configuration.
        rows: of `data`; its validation rows are the prompts unless `evaluate.prompts.path` names a data set.
        most: the most prompts to return, or None.

    Raises:
        UserError: the data set does not exist, is empty, or has bad rows or rows without values that scorers need.
    """
    settings = config.evaluate.prompts
    conversations = _of_data(config, rows) if settings.path is None else _of_their_own(config)
    limits = [len(conversations), *(limit for limit in (settings.max_samples, most) if limit is not None)]
    found = [_prompt(config, conversation) for conversation in conversations[: min(limits)]]
    distinct = {prompt.prompt_id: prompt for prompt in found}
    if len(distinct) < len(found):
        say("evaluate", f"{len(found) - len(distinct)} of {len(found)} prompts are copies of others: asked once")
    return list(distinct.values())


def questions(prompts: list[Prompt], samples: int) -> list[Question]:
    """One question for each prompt and sample."""
    return [Question(prompt, sample) for prompt in prompts for sample in range(samples)]


def token_ids(asked: list[Question], rendering: Rendering) -> list[list[int]]:
    """The tokens of the prompts, up to the start of the assistant's turn.

    Raises:
        UserError: the chat template refuses some of them.
    """
    texts, problems = [], Problems()
    for question in asked:
        try:
            texts.append(harmony.prompt(question.prompt.conversation, rendering))
        except ConversationError as error:
            problems.add(f"{question.prompt.conversation.where}: {error}.")
    problems.raise_if_any()
    return rendering.tokenizer(texts, add_special_tokens=False)["input_ids"]


def fingerprint(asked: list[Question]) -> str:
    """Of all prompts, samples and expected values."""
    keys = sorted(f"{prompt_id}/{sample}" for prompt_id, sample in (question.key for question in asked))
    return xxhash.xxh3_128_hexdigest(" ".join(keys).encode())


def _of_data(config: PipelineConfig, rows: Rows) -> Conversations:
    expected = config.evaluate.prompts.expected
    if expected:  # the same rows, read with more of their columns
        sources = [replace(source, expected=expected) for source in data_sources(config.data)]
        rows = read_rows(config, sources)
    _, validation = split_rows(config, rows)
    return validation


def _of_their_own(config: PipelineConfig) -> Conversations:
    settings = config.evaluate.prompts
    names = ("path", "revision", "split", "columns", "roles", "filter")
    own = replace(config.data, blend=[], streaming=False, **{name: getattr(settings, name) for name in names})
    source = Source("evaluate.prompts", own, expected=settings.expected, needs_answers=False)
    conversations = read_rows(config, [source]).conversations
    count = len(conversations)
    return conversations.select(sampling.choose([count], [count], config.data.seed))


def _prompt(config: PipelineConfig, row: Conversation) -> Prompt:
    conversation = harmony.asked(row, config.data.reasoning_effort.name, config.data.reasoning_language)
    expected = dict(_known(conversation)) | config.evaluate.prompts.expected_of_all | row.expected
    content = [conversation.messages, conversation.tools, conversation.reasoning_effort, expected]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return Prompt(xxhash.xxh3_64_hexdigest(text.encode()), conversation, expected)


def _known(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Expected values that the prompt itself states."""
    if conversation.reasoning_language is not None:
        yield "language", conversation.reasoning_language
