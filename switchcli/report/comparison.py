"""Runs compared with a baseline: sizes, quality, speed-up, rate and dropped tokens of each series."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from switchcli.metric_names import DROPPED_FRACTION, TOKENS_PER_SECOND
from switchcli.report.runs import Run
from switchcli.report.series import SeedSpread, Series, differences, flatten, seed_spread
from switchcli.report.speed import Cost, QualityMetric, Speed, baseline_run, quality_metric, speed

SIZES = ("parameters", "active_parameters", "flops_per_sequence")
MAX_KEYS = 3
"""Keys of recipes that a note names, at most."""


class SeriesRow(NamedTuple):
    """The results of a series. What no run knows is None."""

    label: str
    seeds: int
    num_unfinished: int
    """Number of runs without a result."""
    sizes: Mapping[str, int | None]
    steps: SeedSpread | None
    final: SeedSpread | None
    """The quality metric at the end of each run."""
    over: SeedSpread | None
    """Gain over the baseline's run of the same seed, at the common step where there is one; positive is better."""
    at_common: SeedSpread | None
    """The quality metric at the common step; None where all runs end there."""
    speed: Speed
    tokens_per_second: SeedSpread | None
    dropped: SeedSpread | None
    """Fraction of tokens dropped, over the last tenth of the logged steps."""

    def to_json(self) -> dict[str, Any]:
        """Return the row for scripts."""
        costs = zip(Cost._fields, self.speed.costs, self.speed.factors, strict=True)
        spreads = ("steps", "final", "over", "at_common", TOKENS_PER_SECOND, "dropped")
        return {
            "series": self.label,
            "seeds": self.seeds,
            "going_on": self.num_unfinished,
            **self.sizes,
            **{name: _json(getattr(self, name)) for name in spreads},
            "reached": self.speed.reached,
            "to_quality": {name: {"cost": _json(cost), "speed_up": _json(factor)} for name, cost, factor in costs},
        }

    def flat(self) -> dict[str, Any]:
        """Return the row for a file, one number per column, such as `to_quality.steps.cost.mean`."""
        return flatten(self.to_json())


class Comparison(NamedTuple):
    """All runs that trained, compared with the series of the baseline."""

    series: tuple[Series, ...]
    baseline: Series
    metric: QualityMetric
    quality: float | None
    """The quality whose cost is compared; None for what each run's baseline run ends with."""
    common_step: int | None
    """The last step at which all evaluated runs have the metric; None where all of them end there."""
    rows: tuple[SeriesRow, ...]
    notes: tuple[str, ...]

    def gain(self, series: Series, reference: Series) -> SeedSpread | None:
        """Return the gain of a series over another, per seed, at the common step or at the end."""
        return _gain(series, reference, self.metric, self.common_step)

    @property
    def num_tokenizers(self) -> int:
        return _num_tokenizers(self.series)


def compare(series: Sequence[Series], baseline: str | None, quality: float | None, evaluations: int) -> Comparison:
    """Compare series of runs that trained, at least one.

    Args:
        series: The series in their order.
        baseline: The name of a run of the series to compare with; None for the first series.
        quality: The quality whose cost is compared; None for what each run's baseline run ends with.
        evaluations: The number of evaluations that the metric is a mean over.
    """
    reference = next((one for one in series if baseline in {run.name for run in one.runs}), series[0])
    metric = quality_metric(_num_tokenizers(series), evaluations)
    step = _common_step(series, metric)
    rows = tuple(_row(one, reference, metric, quality, step) for one in series)
    return Comparison(tuple(series), reference, metric, quality, step, rows, tuple(_notes(series, metric, step)))


def _num_tokenizers(series: Sequence[Series]) -> int:
    return len({run.tokenizer for one in series for run in one.runs if run.tokenizer is not None})


def _common_step(series: Sequence[Series], metric: QualityMetric) -> int | None:
    curves = [curve for one in series for run in one.runs if (curve := metric.curve(run)) is not None]
    last_steps = {int(curve.steps[-1]) for curve in curves}
    # A run that was evaluated only before its first step does not move the common step to 0.
    return min(filter(None, last_steps), default=None) if len(last_steps) > 1 else None


def _gain(series: Series, reference: Series, metric: QualityMetric, step: int | None) -> SeedSpread | None:
    gains = []
    for run in series.runs:
        ours, theirs = metric.at(run, step), metric.at(baseline_run(run, reference), step)
        if ours is not None and theirs is not None:
            gains.append(metric.sign * (ours - theirs))
    return seed_spread(gains)


def _row(
    series: Series, baseline: Series, metric: QualityMetric, quality: float | None, common_step: int | None
) -> SeriesRow:
    runs = series.runs
    sizes = {name: [int(size) for run in runs if (size := run.number(name)) is not None] for name in SIZES}
    return SeriesRow(
        label=series.label,
        seeds=len(runs),
        num_unfinished=sum(not run.result for run in runs),
        sizes={name: values[0] if values else None for name, values in sizes.items()},
        steps=seed_spread(run.step for run in runs),
        final=seed_spread(metric.at(run, None) for run in runs),
        over=_gain(series, baseline, metric, common_step),
        at_common=None if common_step is None else seed_spread(metric.at(run, common_step) for run in runs),
        speed=speed(series, baseline, metric, quality),
        tokens_per_second=seed_spread(map(_tokens_per_second, runs)),
        dropped=seed_spread(map(_dropped_fraction, runs)),
    )


def _tokens_per_second(run: Run) -> float | None:
    """Return the rate of the result, or the median of what was logged."""
    if (rate := run.number(TOKENS_PER_SECOND)) is not None:
        return rate
    curve = run.curves.get(TOKENS_PER_SECOND)
    return None if curve is None else float(np.median(curve.values))


def _dropped_fraction(run: Run) -> float | None:
    curve = run.curves.get(DROPPED_FRACTION)
    return None if curve is None else float(curve.values[-max(1, len(curve.values) // 10) :].mean())


def _notes(series: Sequence[Series], metric: QualityMetric, common_step: int | None) -> Iterator[str]:
    """Yield what the reader has to know before the results are compared."""
    tokenizers = _num_tokenizers(series)
    if tokenizers > 1:
        yield (
            f"The runs use {tokenizers} tokenizers: neg. log perplexities over different tokens cannot be compared, so "
            "the runs are compared by bits a byte alone, of which fewer are better."
        )
    text_key = re.compile(r"(data(?!\.(tokenizer|lanes|stream_shards))|tasks)\b")
    keys = [key for key in differences(series) if text_key.match(key)]
    if keys:
        yield (
            f"The held-out text is not the same in all series, by {', '.join(keys[:MAX_KEYS])}"
            f"{', ...' if len(keys) > MAX_KEYS else ''}: metrics of different texts can hardly be compared."
        )
    unevaluated = [run.name for one in series for run in one.runs if metric.name not in run.curves]
    if unevaluated:
        yield f"No {metric.title} was logged by {', '.join(unevaluated)}: left out of the comparison."
    if common_step is not None:
        yield (
            f"The runs have different lengths: besides the value at the end of each, {metric.title} is given at step "
            f"{common_step:,}, the last at which all evaluated runs have it."
        )


def _json(value: SeedSpread | None) -> dict[str, float | None]:
    return dict.fromkeys(SeedSpread._fields) if value is None else value._asdict()
