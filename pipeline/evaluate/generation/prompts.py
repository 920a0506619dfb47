"""What models are asked: rows of a data set, each up to the answer that it ends with."""

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

_SEEDS = 2**31  # what every server takes


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: of its contents and of what is expected: the same in every run.
        conversation: up to the answer, with the effort and the language that it asks for.
        expected: what scorers need to know; `language` wherever the prompt asks for one.
    """

    prompt_id: str
    conversation: Conversation
    expected: dict[str, str]


class Question(NamedTuple):
    """A prompt asked once: of several samples each is a question of its own."""

    prompt: Prompt
    sample: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from all others of an evaluation."""
        return self.prompt.prompt_id, self.sample

    def seed(self, seed: int) -> int:
        """Seed of this answer's draws: no answer depends on which others are asked for."""
        return xxhash.xxh3_64_intdigest(f"{seed}/{self.prompt.prompt_id}/{self.sample}".encode()) % _SEEDS

    def transcript(self, completion: str, finish: str, tokens: int, seed: int | None) -> Transcript:
        """An answer as it was generated.

        Args:
            completion: what follows `<|start|>assistant`, special tokens included.
            finish: why it ended, where it does not end with a stop token.
            tokens: generated.
            seed: of the draws, or None.
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
    """The prompts that `evaluate.prompts` names, every one once.

    Args:
        config: the resolved configuration.
        rows: of `data`, whose validation rows are asked unless there is another data set.
        most: ask only the first so many.

    Raises:
        UserError: the data set is not there, empty, or has bad rows, or rows without what scorers need.
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
    """Each prompt as often as it is to be answered."""
    return [Question(prompt, sample) for prompt in prompts for sample in range(samples)]


def token_ids(asked: list[Question], rendering: Rendering) -> list[list[int]]:
    """The prompts as tokens, up to where the assistant's turn begins.

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
    """Of all that is asked and expected."""
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
    """What a prompt says itself of a right answer."""
    if conversation.reasoning_language is not None:
        yield "language", conversation.reasoning_language
