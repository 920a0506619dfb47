"""Verdicts: whether a model passed each prompt. Pass rates and paired comparisons are computed from verdicts.

An undecided verdict is None. The rate omits undecided verdicts, and their share is reported beside the rate.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.evaluate.statistics import Interval, Values, mean_interval, wilson


@dataclass(frozen=True)
class Verdict:
    """A scorer's verdict on one transcript.

    Attributes:
        prompt_id: the transcript's prompt.
        sample: the transcript's sample.
        group: a group that gets its own pass rate, such as a language, or "" for none.
        passed: whether the transcript passed, or None if undecided.
    """

    prompt_id: str
    sample: int
    group: str
    passed: bool | None


def figures(name: str, verdicts: list[Verdict]) -> dict[str, float]:
    """Compute the pass rate with its interval and counts, in total and for each group.

    Returns:
        `<name>`: the pass rate, absent if no verdict is decided.
        `<name>_low`, `<name>_high`: the 95 % interval of the pass rate, absent if no verdict is decided.
        `<name>_decided`: the number of decided verdicts.
        `<name>_undecided`: the share of undecided verdicts.
        Each group has the same figures, with names that end in /<group>. The result is empty if there are no verdicts.
    """
    if not verdicts:
        return {}
    groups: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.group:
            groups[f"/{verdict.group}"].append(verdict)
    parts = {"": verdicts, **dict(sorted(groups.items()))}
    return {key: value for suffix, part in parts.items() for key, value in _rate(name, suffix, part).items()}


def _rate(name: str, suffix: str, verdicts: list[Verdict]) -> dict[str, float]:
    decided = sum(verdict.passed is not None for verdict in verdicts)
    counts = {
        f"{name}_decided{suffix}": float(decided),
        f"{name}_undecided{suffix}": 1 - decided / len(verdicts),
    }
    if not decided:
        return counts
    shares = np.array(list(by_prompt(verdicts).values()))
    bounds = interval(shares)
    rate = {f"{name}{suffix}": float(shares.mean())}
    return rate | {f"{name}_low{suffix}": bounds.low, f"{name}_high{suffix}": bounds.high} | counts


def by_prompt(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Compute the share of passed transcripts for each prompt. Prompts without a decided transcript are omitted."""
    passed: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.passed is not None:
            passed[verdict.prompt_id].append(verdict.passed)
    return {prompt_id: sum(each) / len(each) for prompt_id, each in passed.items()}


def interval(shares: Values) -> Interval:
    """Compute the confidence interval of the mean share.

    `shares` has one number for each prompt: the share of passed answers. If all shares are 0 or 1, as with one answer
    per prompt, the result is Wilson's interval. Otherwise it is a bootstrap interval over the prompts. Several answers
    to a prompt are correlated. If each answer counted as a prompt, the interval would be too narrow.
    """
    if np.isin(shares, (0, 1)).all():
        return wilson(int(shares.sum()), len(shares))
    return mean_interval(shares) if len(shares) > 1 else Interval(0.0, 1.0)


def pair(model: Iterable[Verdict], reference: Iterable[Verdict]) -> tuple[Values, Values]:
    """Pair the verdicts of two models on the same prompt and sample, for `statistics.compare`.

    Pass only one sample per prompt, because several samples of a prompt are not independent.

    Returns:
        The verdicts of `model` and the verdicts of `reference`: two arrays of booleans in the same order. Both have the
        shape (N). Pairs with an undecided verdict are omitted.
    """
    first, second = _decided(model), _decided(reference)
    common = sorted(first.keys() & second.keys())
    return np.array([first[key] for key in common], bool), np.array([second[key] for key in common], bool)


def _decided(verdicts: Iterable[Verdict]) -> Mapping[tuple[str, int], bool]:
    return {(each.prompt_id, each.sample): each.passed for each in verdicts if each.passed is not None}
