"""Whether a model passed a prompt: what scorers of transcripts say first, so that models can be paired by prompt.

Rates come from verdicts. What cannot be told is None: it is left out of the rate, and its share is shown beside it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.evaluate.statistics import Interval, Values, mean_interval, wilson


@dataclass(frozen=True)
class Verdict:
    """On one transcript.

    Attributes:
        prompt_id: of the transcript.
        sample: of the transcript.
        group: what figures are also given for, such as a language; empty: none.
        passed: None where it cannot be told.
    """

    prompt_id: str
    sample: int
    group: str
    passed: bool | None


def figures(name: str, verdicts: list[Verdict]) -> dict[str, float]:
    """The pass rate and what it rests on, over all and for each group; empty without verdicts.

    Returns:
        `<name>`, `<name>_low`, `<name>_high` (95 %), absent where nothing was decided; `<name>_decided`, a count of
        transcripts; `<name>_undecided`, a share. Those of a group end in /<group>.
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
    """Prompt -> share of its decided transcripts that passed; prompts with none are left out."""
    passed: dict[str, list[bool]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.passed is not None:
            passed[verdict.prompt_id].append(verdict.passed)
    return {prompt_id: sum(each) / len(each) for prompt_id, each in passed.items()}


def interval(shares: Values) -> Interval:
    """Of the mean of prompts' shares: Wilson's where each prompt has one answer; else by bootstrap over the prompts.

    Several answers to a prompt resemble each other, so to count them as so many prompts would make it too narrow.
    """
    if np.isin(shares, (0, 1)).all():
        return wilson(int(shares.sum()), len(shares))
    return mean_interval(shares) if len(shares) > 1 else Interval(0.0, 1.0)


def paired(model: Iterable[Verdict], reference: Iterable[Verdict]) -> tuple[Values, Values]:
    """What both decided, in the same order: booleans (N) for `statistics.compare`, first those of `model`.

    Pairs are of a prompt and a sample; of several samples hand in one alone, or the pairs are not independent.
    """
    first, second = _decided(model), _decided(reference)
    common = sorted(first.keys() & second.keys())
    return np.array([first[key] for key in common], bool), np.array([second[key] for key in common], bool)


def _decided(verdicts: Iterable[Verdict]) -> Mapping[tuple[str, int], bool]:
    return {(each.prompt_id, each.sample): each.passed for each in verdicts if each.passed is not None}
