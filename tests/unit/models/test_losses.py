"""Batches for validation are padded on the right and keep the order of examples. A batch is made when it is read."""

from typing import Any

import pytest
import torch

from pipeline.data.harmony import IGNORED
from pipeline.models import losses

LENGTHS = (3, 5, 2, 4, 1)


class Examples:
    """Five examples. Records which examples are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.read.append(number)
        ids = list(range(10 * number + 1, 10 * number + 1 + LENGTHS[number]))
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}


def test_batches_are_padded_on_the_right_and_the_last_one_may_be_smaller() -> None:
    found = losses.batches(Examples(), 2, pad_token_id=0)
    assert len(found) == 3
    first, *_, last = found
    assert first["input_ids"].tolist() == [[1, 2, 3, 0, 0], [11, 12, 13, 14, 15]]
    assert first["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, IGNORED], [IGNORED, 12, 13, 14, 15]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert last["input_ids"].tolist() == [[41]]
    assert torch.equal(found[-1]["input_ids"], last["input_ids"])


def test_a_batch_is_made_each_time_it_is_read() -> None:
    examples = Examples()
    found = losses.batches(examples, 2, pad_token_id=0)
    assert examples.read == []
    found[1]
    assert examples.read == [2, 3]
    found[1:]
    assert examples.read == [2, 3, 2, 3, 4]
    with pytest.raises(IndexError):
        found[3]
