"""Generate answers with a model in memory. transformers generates in batches, padded on the left, with a KV cache.

Every row of a batch has its own random generator, so an answer depends only on its prompt and its seed, with one
exception. The width of a batch may change the order in which numbers are added, and this may change the last bit of a
logit. If two tokens have almost the same logit, another token may then be chosen. So batches are always formed from all
questions, even if most questions already have an answer. Then a resumed evaluation has the same batches.

Legend: B answers in a batch, T tokens, V vocabulary size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationConfig as Decoding
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from pipeline.checkpoints.gpt_oss import STOP_TOKENS
from pipeline.config import GenerationConfig
from pipeline.data.harmony import Rendering
from pipeline.errors import UserError
from pipeline.evaluate.generation import prompts
from pipeline.evaluate.generation.journal import Journal
from pipeline.evaluate.generation.prompts import Question
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.console import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LENGTH = "length"


@dataclass(frozen=True)
class Local:
    """A model in memory that answers questions.

    Attributes:
        model: a causal language model in evaluation mode, on its device. It may be None if only prompts are tokenized.
        rendering: the tokenizer and the settings for rendering prompts.
        settings: the settings of decoding.
        limit: the configuration key of the batch size, for messages.
    """

    model: "PreTrainedModel | None"
    rendering: Rendering
    settings: GenerationConfig
    limit: str = "evaluate.generation.batch_size"

    def ask(self, questions: list[Question], journal: Journal[Transcript], name: str) -> None:
        """Ask the questions that have no answer in the journal.

        Raises:
            UserError: the chat template refuses prompts, or a batch does not fit into the GPU's memory.
        """
        batches = self._batches(questions)
        todo = [batch for batch in batches if any(question.key not in journal for question, _ in batch)]
        for batch in progress(todo, what=f"answers of {name}", unit="batch"):
            journal.add(self.answer(*zip(*batch, strict=True)))

    def answer(self, questions: tuple[Question, ...], prompts: tuple[list[int], ...]) -> list[Transcript]:
        """Answer one batch.

        Args:
            questions: the questions.
            prompts: the token ids of the questions' prompts.

        Raises:
            UserError: the batch does not fit into the GPU's memory.
        """
        seeds = [question.seed(self.settings.seed) for question in questions] if self.settings.temperature else None
        try:
            completions = self._complete(prompts, seeds)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.limit}={self.settings.batch_size}: the GPU's memory is too small for a batch of"
                f" {len(prompts)} answers to prompts of up to {max(map(len, prompts))} tokens. Lower it."
            ) from error
        return [
            question.transcript(
                self.rendering.tokenizer.decode(ids, clean_up_tokenization_spaces=False), _LENGTH, len(ids), seed
            )
            for question, ids, seed in zip(questions, completions, seeds or repeat(None, len(questions)), strict=True)
        ]

    def token_ids(self, questions: list[Question]) -> list[list[int]]:
        """Tokenize the prompts, up to the beginning of the assistant's turn.

        Raises:
            UserError: the chat template refuses some prompts.
        """
        return prompts.token_ids(questions, self.rendering)

    def _batches(self, questions: list[Question]) -> list[list[tuple[Question, list[int]]]]:
        """Split all questions into batches, the longest prompts first. So a lack of memory shows in the first batch."""
        pairs = zip(questions, self.token_ids(questions), strict=True)
        ordered = sorted(pairs, key=lambda pair: (-len(pair[1]), pair[0].key))
        size = self.settings.batch_size
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def _complete(self, prompts: tuple[list[int], ...], seeds: list[int] | None) -> list[list[int]]:
        """Generate the token ids of the completions, each with its stop token."""
        assert self.model is not None
        tokenizer, device = self.rendering.tokenizer, self.model.device
        batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(device)
        stop = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
        decoding = Decoding(
            do_sample=False,  # also when sampling: with _Noise, the greedy choice is a sample
            use_cache=True,
            max_new_tokens=self.settings.max_new_tokens,
            eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
        )
        generate = cast(Callable[..., Tensor], self.model.generate)  # PreTrainedModel does not declare generate
        ids = generate(  # (B, T), including the prompts
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=decoding,
            logits_processor=LogitsProcessorList([] if seeds is None else self._samplers(seeds, device)),
        )
        return [_cut_after_stop(row, stop) for row in ids[:, batch["input_ids"].shape[1] :].tolist()]

    def _samplers(self, seeds: list[int], device: torch.device) -> list[LogitsProcessor]:
        samplers: list[LogitsProcessor] = [TemperatureLogitsWarper(self.settings.temperature)]
        if self.settings.top_p < 1:
            samplers.append(TopPLogitsWarper(self.settings.top_p))
        return [*samplers, _Noise(seeds, device)]


class _Noise(LogitsProcessor):
    """Adds Gumbel noise to logits. The argmax of the sum is a sample from the softmax (the Gumbel-max trick)."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to the scores (B, V). Each row's generator draws V numbers per token."""
        exponential = torch.stack(
            [
                torch.empty_like(row).exponential_(generator=own)
                for row, own in zip(scores, self._generators, strict=True)
            ]
        )
        return scores - exponential.clamp_min(torch.finfo(scores.dtype).tiny).log()


def _cut_after_stop(ids: list[int], stop: list[int]) -> list[int]:
    """Remove the padding after the stop token."""
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return ids[: end + 1]
