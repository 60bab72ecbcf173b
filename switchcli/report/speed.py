"""Steps, seconds and FLOPs to a quality, and how many times fewer they are than a baseline's.

A run has a quality at the first step at which its held-out curve reaches it, on a straight line between two
evaluations. The baseline's own steps are counted in the same way, so that a run is as fast as itself.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from switchcli.metric_names import HELD_OUT, HELD_OUT_BITS
from switchcli.report.runs import Curve, Run
from switchcli.report.series import SeedSpread, Series, seed_spread, smooth


class QualityMetric(NamedTuple):
    """What quality is: a held-out figure, as a mean over so many evaluations."""

    figure: str
    title: str
    sign: int
    """1 where higher is better, -1 where lower is."""
    evaluations: int = 1

    def curve(self, run: Run) -> Curve | None:
        """None where the run has no evaluation yet."""
        if self.figure not in run.curves:
            return None
        return smooth(run.curves[self.figure], self.evaluations)

    def at(self, run: Run, step: float | None) -> float | None:
        """At a step, or where that is None, at the run's end; None where it was not evaluated before and after."""
        curve = self.curve(run)
        if curve is None:
            return None
        step = curve.steps[-1] if step is None else step
        there = curve.steps[0] <= step <= curve.steps[-1]
        return float(curve.at(np.array([float(step)]))[0]) if there else None


def quality_metric(tokenizers: int, evaluations: int) -> QualityMetric:
    """What runs of so many tokenizers can be compared by: of several, only by bits a byte."""
    if tokenizers > 1:
        return QualityMetric(HELD_OUT_BITS, "held-out bits a byte", -1, evaluations)
    return QualityMetric(HELD_OUT, "held-out neg. log perplexity", 1, evaluations)


class Cost(NamedTuple):
    """What it took."""

    steps: float
    seconds: float
    flops: float


class Speed(NamedTuple):
    """Of a series: the quality of each run's partner, what it took to get there, and how many times less than it."""

    reached: int
    """Runs that have the quality at all."""
    costs: tuple[SeedSpread | None, SeedSpread | None, SeedSpread | None]
    times: tuple[SeedSpread | None, SeedSpread | None, SeedSpread | None]


def first_step_reaching(curve: Curve, quality: float) -> float | None:
    """Where a curve, better when higher, first is as high; None where it never is."""
    points = [*zip(curve.steps.tolist(), curve.values.tolist(), strict=True)]
    if points and points[0][1] >= quality:
        return points[0][0]
    for (before, low), (after, high) in pairwise(points):
        if high >= quality:
            return before + (after - before) * (quality - low) / (high - low)
    return None


def cost(run: Run, measure: QualityMetric, quality: float) -> Cost | None:
    """What it took the run to have the quality; None where it never has."""
    curve = measure.curve(run)
    if curve is None:
        return None
    step = first_step_reaching(Curve(curve.steps, measure.sign * curve.values), measure.sign * quality)
    if step is None:
        return None
    return Cost(step, float(run.seconds_at(np.array([step]))[0]), step * run.flops_per_step)


def baseline_run(run: Run, baseline: Series) -> Run:
    """The baseline's run of the same seed; its first where there is none."""
    return next((one for one in baseline.runs if one.seed == run.seed), baseline.runs[0])


def speed(series: Series, baseline: Series, measure: QualityMetric, quality: float | None = None) -> Speed:
    """To `quality`, or where that is None, to what each run's partner ends with."""
    pairs = [(run, baseline_run(run, baseline)) for run in series.runs]
    goals = [measure.at(base, None) if quality is None else quality for _, base in pairs]
    both = [
        (cost(run, measure, goal), cost(base, measure, goal))
        for (run, base), goal in zip(pairs, goals, strict=True)
        if goal is not None
    ]
    own = [mine for mine, _ in both if mine is not None]
    ratios = [_ratios(mine, theirs) for mine, theirs in both if mine is not None and theirs is not None]
    return Speed(len(own), _spreads(own), _spreads(ratios))


def _ratios(mine: Cost, theirs: Cost) -> Cost:
    return Cost(*(base / one if one else np.nan for one, base in zip(mine, theirs, strict=True)))


def _spreads(costs: Sequence[Cost]) -> tuple[SeedSpread | None, SeedSpread | None, SeedSpread | None]:
    steps, seconds, flops = (seed_spread(getattr(one, name) for one in costs) for name in Cost._fields)
    return steps, seconds, flops
