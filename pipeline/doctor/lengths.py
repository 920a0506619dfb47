"""Amounts of data, and the lengths of padded rows. A batch is padded to its longest row."""

from bisect import bisect_left
from dataclasses import dataclass, field

from pipeline.doctor.facts import DataFigures
from pipeline.doctor.rows import Lengths

_STEPS = 512  # of the numerical integral


@dataclass(frozen=True)
class LengthDistribution:
    """The distribution of the examples' lengths, as a piecewise linear quantile function.

    Attributes:
        shares: shares of the examples, ascending from 0 to 1.
        lengths: for each share, the length that this share of the examples does not exceed.
    """

    shares: tuple[float, ...] = (0.0, 1.0)
    lengths: tuple[float, ...] = (1.0, 1.0)

    @classmethod
    def of(cls, found: Lengths, limit: int) -> "LengthDistribution":
        """Make the distribution from measured percentiles and the histogram. Longer examples are cut to `limit`."""
        points = [(0.0, found["shortest"]), (0.5, found["median"]), (0.95, found["p95"]), (1.0, found["longest"])]
        total, below = sum(found["histogram"].values()), 0
        for edge, count in found["histogram"].items():
            below += count
            points.append((below / total, min(int(edge), found["longest"])))
        points.sort()
        least = list(points)
        for i in reversed(range(len(points) - 1)):  # the edge of a bin may be above the longest example in the bin
            least[i] = (points[i][0], min(points[i][1], least[i + 1][1]))
        return cls(tuple(share for share, _ in least), tuple(float(min(length, limit)) for _, length in least))

    def quantile(self, share: float) -> float:
        """Return the length that this share of the examples does not exceed."""
        i = max(bisect_left(self.shares, share), 1)
        (low, high), (shorter, longer) = self.shares[i - 1 : i + 1], self.lengths[i - 1 : i + 1]
        return shorter if high == low else shorter + (longer - shorter) * (share - low) / (high - low)

    def longest_of(self, count: int) -> tuple[float, float]:
        """Return two means of the longest of `count` examples, relative to the mean length of an example.

        The first is the mean over batches, m. The second is the mean over tokens: the mean square divided by m. If all
        examples have the same length, both are 1. The longest of n examples has the quantile function Q(v^(1/n)).
        """
        middles = [(i + 0.5) / _STEPS for i in range(_STEPS)]
        longest = [self.quantile(middle ** (1 / count)) for middle in middles]
        mean, one = sum(longest) / _STEPS, sum(map(self.quantile, middles)) / _STEPS
        return mean / one, sum(length**2 for length in longest) / _STEPS / mean / one


@dataclass(frozen=True)
class Amounts:
    """Numbers of examples, and of their tokens after truncation.

    Attributes:
        prompts: number of prompts to answer.
        supervised: supervised share of the tokens. Training computes logits only for supervised tokens.
        lengths: distribution of the lengths. By default, all examples have the same length.
    """

    train_examples: int
    train_tokens: float
    validation_examples: int
    validation_tokens: float
    prompts: int = 0
    supervised: float = 1.0
    lengths: LengthDistribution = field(default_factory=LengthDistribution)

    @property
    def mean(self) -> float:
        """Mean length of a training example, in tokens."""
        return self.train_tokens / max(self.train_examples, 1)

    @property
    def validation_mean(self) -> float:
        """Mean length of a validation example, in tokens."""
        return self.validation_tokens / max(self.validation_examples, 1)


def amounts_of(data: DataFigures, prompts: int) -> Amounts:
    """Return the numbers of examples and tokens for training and validation, after truncation."""
    rows, tokens, limit = data["rows"], data["tokens"], data["cut"]["max_length"]
    kept = tokens["all"] - data["cut"]["tokens_lost"]
    own = data.get("validation")
    if own is not None:
        others, held = own["tokens"]["examples"], float(own["tokens"]["all"] - own["cut"]["tokens_lost"])
    else:
        share = rows["validation"] / (rows["train"] + rows["validation"])
        others, held = round(tokens["examples"] * share), kept * share
    lengths = LengthDistribution.of(data["lengths"], limit)
    train = tokens["examples"] - others
    return Amounts(train, kept - held, others, held, prompts, tokens["supervised_share"], lengths)
