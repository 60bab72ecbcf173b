"""Steps, seconds and FLOPs until a run reaches a quality, and how many times fewer they are than the baseline's.

A run reaches a quality at the first step at which its held-out curve does, interpolated on a straight line between two
evaluations in training. Nothing is interpolated from the evaluation at step 0, because the curve is too steep there.
The baseline's own cost is counted in the same way, so that a run is exactly as fast as itself.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from switchcli.report.runs import Curve, Run
from switchcli.report.series import SeedSpread, Series, by_seed, seed_spread, smooth
from switchcli.report.significance import Effect, Interval, Verdict, mean_interval

Window = tuple[float, ...]
"""The steps of the evaluations that a value is a mean of: one step without smoothing."""


class QualityMetric(NamedTuple):
    """The held-out metric by which runs are compared, as a mean over so many evaluations. Lower is better."""

    name: str
    title: str
    evaluations: int = 1

    def curve(self, run: Run) -> Curve | None:
        """Return the smoothed curve of the run, or None where it was not evaluated yet."""
        curve = self._evaluated(run)
        return None if curve is None else smooth(curve, self.evaluations)

    def measured(self, run: Run) -> dict[Window, float]:
        """Return the values of the curve by the evaluations that they are means of, in order. None is interpolated."""
        curve = self._evaluated(run)
        if curve is None:
            return {}
        windows = np.lib.stride_tricks.sliding_window_view(curve.steps, min(self.evaluations, len(curve.steps)))
        values = smooth(curve, self.evaluations).values
        return dict(zip(map(tuple, windows.tolist()), values.tolist(), strict=True))

    def at_end(self, run: Run) -> float | None:
        """Return the last value, or None where the run was not evaluated yet."""
        curve = self.curve(run)
        return None if curve is None else float(curve.values[-1])

    def _evaluated(self, run: Run) -> Curve | None:
        """Return the evaluations. A mean over several leaves out the one at step 0, which is not of training."""
        curve = run.curves.get(self.name)
        if curve is None or self.evaluations == 1 or len(curve.steps) == 1 or curve.steps[0] > 0:
            return curve
        return Curve(curve.steps[1:], curve.values[1:])


class Cost(NamedTuple):
    """The training that a run took to reach a quality, interpolated between two evaluations."""

    steps: float
    seconds: float
    flops: float


class Speed(NamedTuple):
    """How soon a series reaches a quality: over its runs, in the order of the fields of `Cost`."""

    reached: int
    """Number of runs that reach it."""
    costs: tuple[SeedSpread | None, ...]
    factors: tuple[Effect | None, ...]
    """How many times fewer steps, seconds and FLOPs it takes than the baseline, over the pairs of a seed that both
    reach the quality: the geometric mean, with its interval from Student's of the logarithms."""


NO_SPEED: Final = Speed(0, (None,) * len(Cost._fields), (None,) * len(Cost._fields))
"""The speed of a series that is not compared."""


def first_step_reaching(curve: Curve, quality: float) -> float | None:
    """Return where a curve, better when higher, first is as high, interpolated; None where it never is.

    NaN where that is before the first point after step 0: a straight line from step 0 on would be far from the curve.
    """
    points = [*zip(curve.steps.tolist(), curve.values.tolist(), strict=True)]
    if points and points[0][1] >= quality:
        first, value = points[0]
        return first if first == 0 or value == quality else math.nan
    for (before, low), (after, high) in pairwise(points):
        if high == quality:
            return after
        if high > quality:
            return before + (after - before) * (quality - low) / (high - low) if before > 0 else math.nan
    return None


def cost(run: Run, metric: QualityMetric, quality: float) -> Cost | None:
    """Return what the run took to reach the quality; None if it never does.

    The step lies between two evaluations, by interpolation. It is NaN, like all else, if the quality was reached before
    the first evaluation in training; seconds or FLOPs are NaN if none were logged.
    """
    curve = metric.curve(run)
    if curve is None:
        return None
    step = first_step_reaching(Curve(curve.steps, -curve.values), -quality)
    if step is None:
        return None
    steps = np.array([step])
    return Cost(step, float(run.seconds_at(steps)[0]), float(run.flops_at(steps)[0]))


def speed(series: Series, baseline: Series, metric: QualityMetric, quality: float | None = None) -> Speed:
    """Return how soon a series reaches a quality; for None, the one that each run's baseline run ends with.

    Speed-ups are over the seeds that the baseline has too. If there are none, each run is compared with the baseline's
    first run.
    """
    costs, factors = list[Cost](), list[Cost]()
    ours, theirs = by_seed(series), by_seed(baseline)
    pairs = ours.keys() & theirs.keys()
    for seed, run in ours.items():
        reference = theirs.get(seed, baseline.runs[0])
        goal = metric.at_end(reference) if quality is None else quality
        if goal is None or (run_cost := cost(run, metric, goal)) is None:
            continue
        costs.append(run_cost)
        reference_cost = cost(reference, metric, goal)
        if reference_cost is not None and (seed in pairs or not pairs):
            both = zip(reference_cost, run_cost, strict=True)
            # NaN, which `seed_spread` leaves out, where the run costs 0.
            factors.append(Cost(*(base / own if own else math.nan for base, own in both)))
    doubt = None
    if series is baseline:
        doubt = Verdict.BASELINE
    elif min(len(ours), len(theirs)) < 2:
        doubt = Verdict.ONE_SEED
    elif len(pairs) < 2:
        doubt = Verdict.NO_PAIRS
    speed_ups = [_speed_up([getattr(one, name) for one in factors], len(pairs), doubt) for name in Cost._fields]
    spreads = tuple(seed_spread(getattr(one, name) for one in costs) for name in Cost._fields)
    return Speed(len(costs), spreads, tuple(speed_ups))


def _speed_up(factors: Sequence[float], num_pairs: int, doubt: Verdict | None) -> Effect | None:
    """Return the speed-up by so many pairs, or None where none has a factor. `doubt` is what forbids an interval."""
    spread = seed_spread(factors)
    if spread is None:
        return None
    known = np.log([factor for factor in factors if 0 < factor < math.inf])
    if len(known):
        spread = spread._replace(mean=math.exp(known.mean()))
    if doubt is not None:
        return Effect(spread, None, doubt)
    # The seeds that do not reach the quality are the slow ones: the others alone would look faster.
    logarithms = mean_interval(known.tolist()) if len(known) == num_pairs else None
    if logarithms is None:
        return Effect(spread, None, Verdict.SOME_SEEDS)
    interval = Interval(*map(math.exp, logarithms))
    return Effect(spread, interval, interval.verdict(1.0, Verdict.FASTER, Verdict.SLOWER))
