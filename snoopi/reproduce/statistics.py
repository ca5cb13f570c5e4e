"""Figures over seeds: means, intervals, and what may be said of a difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Seeds = Mapping[int, float]
"""A figure by seed."""


class Difference(NamedTuple):
    """left - right over the n seeds that both have, with its 95 % interval (nan below two)."""

    mean: float
    low: float
    high: float
    n: int


class Verdict(NamedTuple):
    """word: "holds", "does not hold", "not separable", "one seed", "not run"."""

    word: str
    difference: Difference | None

    def text(self) -> str:
        """The word with the evidence."""
        if self.difference is None:
            return self.word
        mean, low, high, n = self.difference
        if n < 2:
            return f"{self.word}: difference {signed(mean)}"
        return (
            f"{self.word}: difference {signed(mean)} ({signed(low)} to {signed(high)}), {n} seeds"
        )


def spread(values: Seeds) -> tuple[float, float]:
    """Mean and standard deviation over seeds; the deviation of one seed is nan."""
    found = list(values.values())
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else math.nan


def difference(left: Seeds, right: Seeds) -> Difference | None:
    """The paired difference: the same seed means the same prompts and noise on both sides.

    The interval is Student's; it takes the differences for normal, and says nothing of other
    worlds, prompts or recipes. None without a common seed.
    """
    pairs = [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]
    if not pairs:
        return None
    mean, n = statistics.fmean(pairs), len(pairs)
    if n < 2:
        return Difference(mean, math.nan, math.nan, n)
    quantile = _T[min(n - 2, len(_T) - 1)]  # beyond, at most 4 % too wide
    half = quantile * statistics.stdev(pairs) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def judge(left: Seeds, right: Seeds, sign: int) -> Verdict:
    """Whether left is above (sign 1) or below (-1) right.

    It holds, or does not, where the interval of the difference leaves 0 out.
    """
    found = difference(left, right)
    if found is None:
        return Verdict("not run", None)
    if found.n < 2:
        return Verdict("one seed", found)
    ends = sorted((sign * found.low, sign * found.high))
    if ends[0] > 0:
        return Verdict("holds", found)
    return Verdict("does not hold" if ends[1] < 0 else "not separable", found)


def signed(value: float) -> str:
    """Three significant digits and the sign."""
    return f"{value:+.3g}"
