"""Steps, seconds and FLOPs until a run reaches a quality, and how many times fewer they are than the baseline's.

A run reaches a quality at the first step at which its held-out curve does, on a straight line between two evaluations.
The baseline's own cost is counted in the same way, so that a run is exactly as fast as itself.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from switchcli.metric_names import HELD_OUT, HELD_OUT_BITS
from switchcli.report.runs import Curve, Run
from switchcli.report.series import SeedSpread, Series, seed_spread, smooth


class QualityMetric(NamedTuple):
    """The held-out metric by which runs are compared, as a mean over so many evaluations."""

    name: str
    title: str
    sign: int
    """1 where higher is better, -1 where lower is."""
    evaluations: int = 1

    def curve(self, run: Run) -> Curve | None:
        """Return the smoothed curve of the run, or None where it was not evaluated yet."""
        curve = run.curves.get(self.name)
        return None if curve is None else smooth(curve, self.evaluations)

    def at(self, run: Run, step: float | None) -> float | None:
        """Return the value at a step, or at the run's end for None; None outside the evaluated steps."""
        curve = self.curve(run)
        if curve is None:
            return None
        if step is None:
            step = curve.steps[-1]
        if not curve.steps[0] <= step <= curve.steps[-1]:
            return None
        return float(curve.at(np.array([float(step)]))[0])


def quality_metric(num_tokenizers: int, evaluations: int) -> QualityMetric:
    """Return the metric that compares runs of so many tokenizers: bits per byte where there are several."""
    if num_tokenizers > 1:
        return QualityMetric(HELD_OUT_BITS, "held-out bits a byte", -1, evaluations)
    return QualityMetric(HELD_OUT, "held-out neg. log perplexity", 1, evaluations)


class Cost(NamedTuple):
    """The training that a run took to reach a quality."""

    steps: float
    seconds: float
    flops: float


class Speed(NamedTuple):
    """How soon a series reaches a quality: over its runs, in the order of the fields of `Cost`."""

    reached: int
    """Number of runs that reach it."""
    costs: tuple[SeedSpread | None, ...]
    factors: tuple[SeedSpread | None, ...]
    """The baseline's cost divided by the run's, over the runs that reach it together with their baseline run."""


def first_step_reaching(curve: Curve, quality: float) -> float | None:
    """Return where a curve, better when higher, first is as high; None where it never is."""
    points = [*zip(curve.steps.tolist(), curve.values.tolist(), strict=True)]
    if points and points[0][1] >= quality:
        return points[0][0]
    for (before, low), (after, high) in pairwise(points):
        if high >= quality:
            return before + (after - before) * (quality - low) / (high - low)
    return None


def cost(run: Run, metric: QualityMetric, quality: float) -> Cost | None:
    """Return what the run took to reach the quality, or None where it never does."""
    curve = metric.curve(run)
    if curve is None:
        return None
    step = first_step_reaching(Curve(curve.steps, metric.sign * curve.values), metric.sign * quality)
    if step is None:
        return None
    return Cost(step, float(run.seconds_at(np.array([step]))[0]), step * run.flops_per_step)


def baseline_run(run: Run, baseline: Series) -> Run:
    """Return the baseline's run of the same seed, or its first run where there is none."""
    return next((one for one in baseline.runs if one.seed == run.seed), baseline.runs[0])


def speed(series: Series, baseline: Series, metric: QualityMetric, quality: float | None = None) -> Speed:
    """Return how soon a series reaches a quality; for None, the one that each run's baseline run ends with."""
    costs, factors = list[Cost](), list[Cost]()
    for run in series.runs:
        reference = baseline_run(run, baseline)
        goal = metric.at(reference, None) if quality is None else quality
        run_cost = None if goal is None else cost(run, metric, goal)
        if goal is None or run_cost is None:
            continue
        costs.append(run_cost)
        reference_cost = cost(reference, metric, goal)
        if reference_cost is not None:
            factors.append(_divide(reference_cost, run_cost))
    return Speed(len(costs), _spreads(costs), _spreads(factors))


def _divide(reference: Cost, run: Cost) -> Cost:
    """Return how many times the reference costs more; NaN, which `seed_spread` leaves out, where the run costs 0."""
    return Cost(*(theirs / ours if ours else np.nan for theirs, ours in zip(reference, run, strict=True)))


def _spreads(costs: Sequence[Cost]) -> tuple[SeedSpread | None, ...]:
    return tuple(seed_spread(getattr(cost, name) for cost in costs) for name in Cost._fields)
