"""The notes that a conversion records about the pieces of a checkpoint (see `checkpoints.shards`)."""

from typing import TypedDict


class Note(TypedDict, total=False):
    """What a conversion records about a piece. Each conversion has its own of these keys.

    Keys:
        tensor: name of the written stack.
        tensors: names of the written tensors.
        is_copied: whether all of them have the source's bytes.
        layer: number of the layer.
        sums: the sums of `export.account.Account` over the stack.
        saturated_blocks, copied_experts, other_than_trained: see `export.weights.ExpertStack`.
        blocks, inexact: numbers of blocks: all, and those that are not exact in the format.
        codes, scales: numbers of blocks by their largest code; the smallest and the largest scale byte.
    """

    tensor: str
    tensors: list[str]
    is_copied: bool
    layer: int
    sums: dict[str, float]
    saturated_blocks: int
    copied_experts: int
    other_than_trained: int
    blocks: int
    inexact: int
    codes: list[int]
    scales: list[int]
