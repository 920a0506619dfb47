"""Prompts for models: rows of a data set, each without its final answer."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import xxhash

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.config import DataConfig, PromptsConfig, ValidationConfig
from pipeline.data import harmony, sampling
from pipeline.data.conversations import Conversation, ConversationError, drop_answer
from pipeline.data.examples import split_rows
from pipeline.data.harmony import Rendering
from pipeline.data.rows import Conversations, Rows, read_rows
from pipeline.data.sources import Source, data_sources, with_expected
from pipeline.errors import RowProblems
from pipeline.evaluate.transcripts import Transcript, parse
from pipeline.runs.console import say
from pipeline.runs.run import Run

_SEEDS = 2**31  # every server accepts seeds below this


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt_id: a hash of the conversation and of `expected`. It is the same in every run.
        conversation: the conversation up to the answer, with the requested reasoning effort and language.
        expected: properties of a right answer, for scorers. `expected` has a `language` if the prompt asks for one.
        reference: the answer in the data, or None.
    """

    prompt_id: str
    conversation: Conversation
    expected: dict[str, str]
    reference: str | None = None


class Question(NamedTuple):
    """A request for one answer. A prompt with several samples becomes several questions."""

    prompt: Prompt
    sample: int

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the question within an evaluation."""
        return self.prompt.prompt_id, self.sample

    def seed(self, seed: int) -> int:
        """Compute the seed for sampling this answer. It does not depend on the other questions."""
        return xxhash.xxh3_64_intdigest(f"{seed}/{self.prompt.prompt_id}/{self.sample}".encode()) % _SEEDS

    def transcript(self, completion: str, finish: str, tokens: int, seed: int | None) -> Transcript:
        """Read the answer in a completion.

        Args:
            completion: the generated text after `<|start|>assistant`, with special tokens.
            finish: the reason why generation ended. It is used only if the completion does not end with a stop token.
            tokens: number of generated tokens.
            seed: seed of the sampling, or None for greedy decoding.
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
            reference=self.prompt.reference,
        )


def load(run: Run, data: DataConfig, settings: PromptsConfig, rows: Rows, most: int | None = None) -> list[Prompt]:
    """Load the prompts of `evaluate.prompts`, without duplicates.

    Args:
        run: the run whose directory has the tables of rows.
        data: settings of the data.
        settings: `evaluate.prompts`.
        rows: the rows of `data`. The validation split of these rows gives the prompts, unless evaluate.prompts.path is
            set.
        most: the maximum number of prompts, or None for no limit.

    Raises:
        UserError: the data set is missing or empty, a row is bad, or a row lacks a property that a scorer needs.
    """
    own = settings.path is not None
    conversations = _read_own(run, data, settings) if own else _read_validation(run, data, settings, rows)
    limits = [len(conversations), *(limit for limit in (settings.max_samples, most) if limit is not None)]
    found = [_prompt(data, settings, conversation) for conversation in conversations[: min(limits)]]
    distinct = {prompt.prompt_id: prompt for prompt in found}
    if len(distinct) < len(found):
        say("evaluate", f"{len(found) - len(distinct)} of {len(found)} prompts are duplicates, each is asked only once")
    return list(distinct.values())


def questions(prompts: list[Prompt], samples: int) -> list[Question]:
    """Make `samples` questions from each prompt."""
    return [Question(prompt, sample) for prompt in prompts for sample in range(samples)]


def token_ids(asked: list[Question], rendering: Rendering) -> list[list[int]]:
    """Tokenize the prompts, up to the beginning of the assistant's turn.

    Raises:
        UserError: the chat template refuses some prompts.
    """
    texts, problems = [], RowProblems()
    for question in asked:
        try:
            texts.append(harmony.render_prompt(question.prompt.conversation, rendering))
        except ConversationError as error:
            problems.add(question.prompt.conversation.where, str(error))
    problems.raise_if_any()
    return rendering.tokenizer(texts, add_special_tokens=False)["input_ids"]


def fingerprint(asked: list[Question]) -> str:
    """Hash all questions, including the expected properties of their answers."""
    keys = sorted(f"{prompt_id}/{sample}" for prompt_id, sample in (question.key for question in asked))
    return xxhash.xxh3_128_hexdigest(" ".join(keys).encode())


def _read_validation(run: Run, data: DataConfig, settings: PromptsConfig, rows: Rows) -> Conversations:
    if expected := settings.expected:  # read the same rows again, with the columns for scorers
        rows = read_rows(run, with_expected(data_sources(data), expected))
    _, validation = split_rows(data, rows)
    return validation


def _read_own(run: Run, data: DataConfig, settings: PromptsConfig) -> Conversations:
    names = ("path", "revision", "split", "columns", "roles", "filter")
    own = replace(
        data,
        blend=[],
        validation=ValidationConfig(),
        streaming=False,
        **{name: getattr(settings, name) for name in names},
    )
    source = Source("evaluate.prompts", own, expected=settings.expected, needs_answers=False)
    conversations = read_rows(run, [source]).conversations
    count = len(conversations)
    return conversations.select(sampling.choose([count], [count], data.seed))


def _prompt(data: DataConfig, settings: PromptsConfig, row: Conversation) -> Prompt:
    conversation = drop_answer(row, data.reasoning_effort.name, data.reasoning_language)
    expected = dict(_known(conversation)) | settings.expected_of_all | row.expected
    content = [conversation.messages, conversation.tools, conversation.reasoning_effort, expected]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return Prompt(xxhash.xxh3_64_hexdigest(text.encode()), conversation, expected, _reference(row))


def _reference(row: Conversation) -> str | None:
    """Return the text of the answer that `harmony.drop_answer` drops from a row, or None."""
    last = row.messages[-1]
    return (last["content"] or None) if last["role"] == "assistant" else None


def _known(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield (name, value) for each expected property that the prompt itself states."""
    if conversation.reasoning_language is not None:
        yield "language", conversation.reasoning_language
