"""The significance of a difference between two series: its 95 % interval over seeds, and a verdict.

Runs of the same seed are compared with each other where there are such pairs, since they share the order of the text:
the interval is Student's, of the differences of the pairs. Without pairs it is Welch's, of the difference of the means.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from switchcli.report.series import SeedSpread, seed_spread


class Verdict(StrEnum):
    """The result of comparing a series with another over seeds. Reports and JSON have these words."""

    BASELINE = "baseline"
    BETTER = "better"
    WORSE = "worse"
    FASTER = "faster"
    SLOWER = "slower"
    NO_DIFFERENCE = "no difference seen"
    ONE_SEED = "one seed: cannot tell"
    NO_PAIRS = "fewer than two seeds in common: cannot tell"
    NO_COMMON_STEP = "no step in common: cannot tell"
    OTHER_TASKS = "other tasks: not compared"
    SOME_SEEDS = "not with every seed: cannot tell"

    @property
    def is_difference(self) -> bool:
        """Return whether the interval excludes that there is no difference."""
        return self in (Verdict.BETTER, Verdict.WORSE, Verdict.FASTER, Verdict.SLOWER)


class Interval(NamedTuple):
    """The 95 % interval of a mean."""

    low: float
    high: float

    def text(self, number_format: str) -> str:
        """Return `low to high`, or one number where both are equal in this format."""
        low, high = (f"{bound:{number_format}}" for bound in self)
        return low if low == high else f"{low} to {high}"

    def verdict(self, zero: float, above: Verdict, below: Verdict) -> Verdict:
        """Return whether the interval is above or below `zero`, the value without a difference, or contains it."""
        if self.low > zero:
            return above
        return below if self.high < zero else Verdict.NO_DIFFERENCE


class Effect(NamedTuple):
    """The effect of one series over another: its gain, where positive is better, or how many times faster it is."""

    spread: SeedSpread
    """Over the pairs of a seed; without pairs, of each run over the mean of the other series."""
    interval: Interval | None
    """None where there are too few seeds for one."""
    verdict: Verdict

    def text(self, number_format: str) -> str:
        """Return `mean (low to high)`, or the mean alone without an interval or with one that is a point."""
        mean = f"{self.spread.mean:{number_format}}"
        around = mean if self.interval is None else self.interval.text(number_format)
        return mean if around == mean else f"{mean} ({around})"


def gain(ours: Mapping[Any, float], theirs: Mapping[Any, float]) -> Effect | None:
    """Return the gain of one series over another, from a value per seed where higher is better.

    None where one of them has no value.
    """
    if not ours or not theirs:
        return None
    paired = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    # One pair of several seeds says less than all of them without pairs.
    if len(paired) > 1 or (paired and min(len(ours), len(theirs)) == 1):
        values, interval = paired, mean_interval(paired)
    else:
        values = [value - float(np.mean([*theirs.values()])) for value in ours.values()]
        interval = _welch_interval([*ours.values()], [*theirs.values()])
    spread = seed_spread(values)
    verdict = Verdict.ONE_SEED if interval is None else interval.verdict(0.0, Verdict.BETTER, Verdict.WORSE)
    return None if spread is None else Effect(spread, interval, verdict)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return Student's interval of the mean of a population from a sample; None for less than two values."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    margin = t_95(len(values) - 1) * error
    return Interval(mean - margin, mean + margin)


def _welch_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval | None:
    """Return Welch's interval of the difference of two means; the samples may differ in size and in variance."""
    if min(len(ours), len(theirs)) < 2:
        return None
    difference = float(np.mean(ours) - np.mean(theirs))
    squares = [float(np.var(sample, ddof=1)) / len(sample) for sample in (ours, theirs)]  # of the means' errors
    if not sum(squares):
        return Interval(difference, difference)
    # Welch and Satterthwaite: a fractional number, at least the smaller sample's degrees of freedom.
    parts = sum(square**2 / (len(sample) - 1) for square, sample in zip(squares, (ours, theirs), strict=True))
    margin = t_95(sum(squares) ** 2 / parts) * math.sqrt(sum(squares))
    return Interval(difference - margin, difference + margin)


@functools.cache
def t_95(freedom: float) -> float:
    """Return the bound that Student's t with so many degrees of freedom stays within with a probability of 95 %.

    With t = sqrt(freedom) * tan(angle) the density of the angle is proportional to cos(angle) ** (freedom - 1).
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (freedom - 1)
    probability = np.cumsum(density[1:] + density[:-1])  # by trapezoids, up to a factor
    angle = np.interp(0.95 * probability[-1], probability, angles[1:])
    return math.sqrt(freedom) * math.tan(angle)
