"""Generates the study's data: sums in three languages, with a line of reasoning.

A row is `<bos> <user> 3 plus 6 minus 2 <think> … <final> 7 <end>`. All words are in the prompt's language, except for
the reasoning. A base model reasons in language 0 in half of the rows, whatever the prompt's language. Fine-tuning
changes two habits: the model always reasons in the prompt's language, and it chooses other filler words. The fillers
are random. Their distribution depends on the operation, so a model can learn it, but cannot predict the words.

All rows have the same length, so batches need no padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from pipeline.data.harmony import IGNORED

LANGUAGES = 3
NUMBERS = 8  # results are taken modulo 8
OPERATIONS = 3  # plus, minus, maximum
FILLERS = 8
SPECIAL = ("<pad>", "<bos>", "<user>", "<think>", "<final>", "<end>")
_PAD, BOS, USER, THINK, FINAL, END = range(len(SPECIAL))
_WORDS = NUMBERS + OPERATIONS + FILLERS
VOCABULARY = len(SPECIAL) + LANGUAGES * _WORDS
_PROMPT = 8  # tokens up to and with <think>
_FILLERS_OF = {8: 3, 12: 3, 16: 5}  # column of a filler -> column of the operation that it depends on
_SHARPNESS = 1.5  # standard deviation of the logits of the fillers
_SHIFT = 0.4  # standard deviation of their change by fine-tuning, relative to the line above


@dataclass(frozen=True)
class Habits:
    """How rows of a data set are written.

    Attributes:
        like_prompt: share of the rows whose reasoning is in the prompt's language. In the others it is in language 0.
        fillers: probabilities of the filler words, (languages, operations, fillers).
    """

    like_prompt: float
    fillers: Tensor

    @classmethod
    def of(cls, seed: int, *, is_tuned: bool) -> "Habits":
        """Return the habits of the base model, or of the fine-tuned model."""
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randn(2, LANGUAGES, OPERATIONS, FILLERS, generator=generator)
        logits = first + _SHIFT * second if is_tuned else first
        return cls(1.0 if is_tuned else 0.5, (_SHARPNESS * logits).softmax(dim=-1))


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of equal length.

    Attributes:
        ids: token ids, (rows, length).
        labels: ids after the prompt, and `IGNORED` in the prompt.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.labels = ids.clone()
        self.labels[:, :_PROMPT] = IGNORED

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return a batch as the program's losses take it."""
        ids = self.ids[rows]
        return {"input_ids": ids, "labels": self.labels[rows], "attention_mask": torch.ones_like(ids)}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Split all rows into batches, in order."""
        return [self.batch(rows) for rows in torch.arange(len(self)).split(size)]


def expect_tokens(rows: Rows, habits: Habits) -> Tensor:
    """Return the probability of each token after the prompt, given the tokens before it: (rows, tokens, vocabulary).

    The rows must have the habits of a fine-tuned model. Then only the fillers are random.
    """
    chances = functional.one_hot(rows.ids, VOCABULARY).double()
    for column, of in _FILLERS_OF.items():
        language = (rows.ids[:, column] - len(SPECIAL)) // _WORDS
        operation = (rows.ids[:, of] - len(SPECIAL)) % _WORDS - NUMBERS
        words = _word(language, NUMBERS + OPERATIONS).unsqueeze(1) + torch.arange(FILLERS)
        chances[:, column] = 0.0
        chances[:, column].scatter_(1, words, habits.fillers[language, operation].double())
    return chances[:, _PROMPT:]


def make_rows(count: int, habits: Habits, seed: int) -> Rows:
    """Generate random rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> Tensor:
        return torch.randint(below, (count,), generator=generator)

    language = draw(LANGUAGES)
    a, b, c, first, second = draw(NUMBERS), draw(NUMBERS), draw(NUMBERS), draw(OPERATIONS), draw(OPERATIONS)
    is_like_prompt = torch.rand(count, generator=generator) < habits.like_prompt
    thought = torch.where(is_like_prompt, language, 0)
    middle = _compute(a, b, first)
    result = _compute(middle, c, second)

    def filler(operation: Tensor) -> Tensor:
        chances = habits.fillers[thought, operation]
        word = torch.multinomial(chances, 1, generator=generator).squeeze(1)
        return _word(thought, NUMBERS + OPERATIONS + word)

    def operation(of: Tensor, kind: Tensor) -> Tensor:
        return _word(of, NUMBERS + kind)

    prompt = [_word(language, a), operation(language, first), _word(language, b)]
    prompt += [operation(language, second), _word(language, c)]
    steps = [filler(first), _word(thought, a), operation(thought, first), _word(thought, b), filler(first)]
    steps += [_word(thought, middle), operation(thought, second), _word(thought, c), filler(second)]
    steps += [_word(thought, result)]
    special = [torch.full_like(a, each) for each in range(len(SPECIAL))]
    row = [special[BOS], special[USER], *prompt, special[THINK], *steps]
    row += [special[FINAL], _word(language, result), special[END]]
    return Rows(torch.stack(row, dim=1))


def _compute(a: Tensor, b: Tensor, kind: Tensor) -> Tensor:
    return torch.stack([(a + b) % NUMBERS, (a - b) % NUMBERS, torch.maximum(a, b)]).gather(0, kind[None])[0]


def _word(language: Tensor, word: Tensor) -> Tensor:
    return len(SPECIAL) + language * _WORDS + word
