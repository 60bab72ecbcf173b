"""What a report says of each series, in numbers: sizes, quality, speed-up, routing, rate."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from switchcli.metric_names import DROPPED_FRACTION, TOKENS_PER_SECOND
from switchcli.report.runs import Run
from switchcli.report.series import SeedSpread, Series, differences, seed_spread
from switchcli.report.speed import QualityMetric, Speed, baseline_run, quality_metric, speed

KEYS = 3
"""Of recipes, that a note names, at most."""
SIZES = ("parameters", "active_parameters", "flops_per_sequence")


class SeriesRow(NamedTuple):
    """A series. What no run knows is None."""

    label: str
    seeds: int
    going_on: int
    """Runs without a result."""
    sizes: Mapping[str, int | None]
    steps: SeedSpread | None
    final: SeedSpread | None
    over: SeedSpread | None
    """Over the baseline's, of the same seed, at the common step where there is one; better is more."""
    at_common: SeedSpread | None
    """At the common step; None where all end there."""
    speed: Speed
    tokens_per_second: SeedSpread | None
    dropped: SeedSpread | None
    """Share of the tokens, over the last tenth of what was logged."""

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        costs = zip(("steps", "seconds", "flops"), self.speed.costs, self.speed.times, strict=True)
        return {
            "series": self.label,
            "seeds": self.seeds,
            "going_on": self.going_on,
            **self.sizes,
            **{name: _json(getattr(self, name)) for name in ("steps", "final", "over", "at_common")},
            **{name: _json(getattr(self, name)) for name in (TOKENS_PER_SECOND, "dropped")},
            "reached": self.speed.reached,
            "to_quality": {name: {"cost": _json(cost), "speed_up": _json(times)} for name, cost, times in costs},
        }

    def flat(self) -> dict[str, Any]:
        """For a table: one figure a column."""
        return dict(_flat("", self.to_json()))


class Comparison(NamedTuple):
    """All runs of a report, together."""

    series: tuple[Series, ...]
    baseline: Series
    measure: QualityMetric
    quality: float | None
    common_step: int | None
    """The last at which all runs that were evaluated have the measure, where they do not end alike."""
    rows: tuple[SeriesRow, ...]
    notes: tuple[str, ...]

    def gain_over(self, one: Series, other: Series) -> SeedSpread | None:
        """What `one` is better by than `other`, seed by seed, where all have come to."""
        return _over(one, other, self.measure, self.common_step)

    @property
    def tokenizers(self) -> int:
        return len(digests(self.series))


def compare(series: Sequence[Series], baseline: str | None, quality: float | None, evaluations: int) -> Comparison:
    """Of runs that trained, at least one; `baseline` is the name of one of them, the first where it is absent."""
    base = next((one for one in series if baseline in {run.name for run in one.runs}), series[0])
    cut = digests(series)
    measure = quality_metric(len(cut), evaluations)
    common = _common_step(series, measure)
    rows = tuple(_row(one, base, measure, quality, common) for one in series)
    return Comparison(
        tuple(series), base, measure, quality, common, rows, tuple(_notes(series, len(cut), common, measure))
    )


def digests(series: Sequence[Series]) -> list[str]:
    """Of the tokenizers that the runs read by."""
    return [*dict.fromkeys(run.tokenizer for one in series for run in one.runs if run.tokenizer is not None)]


def _common_step(series: Sequence[Series], measure: QualityMetric) -> int | None:
    """Runs that were evaluated before their first step alone have no say."""
    curves = [curve for one in series for run in one.runs if (curve := measure.curve(run)) is not None]
    lasts = {int(curve.steps[-1]) for curve in curves}
    return min(filter(None, lasts), default=None) if len(lasts) > 1 else None


def _over(one: Series, other: Series, measure: QualityMetric, step: int | None) -> SeedSpread | None:
    pairs = [(measure.at(run, step), measure.at(baseline_run(run, other), step)) for run in one.runs]
    return seed_spread(measure.sign * (mine - his) for mine, his in pairs if mine is not None and his is not None)


def _row(one: Series, base: Series, measure: QualityMetric, quality: float | None, common: int | None) -> SeriesRow:
    return SeriesRow(
        one.label,
        len(one.runs),
        sum(not run.result for run in one.runs),
        {name: next((int(size) for run in one.runs if (size := run.number(name)) is not None), None) for name in SIZES},
        seed_spread(run.step for run in one.runs),
        seed_spread(measure.at(run, None) for run in one.runs),
        _over(one, base, measure, common),
        None if common is None else seed_spread(measure.at(run, common) for run in one.runs),
        speed(one, base, measure, quality),
        seed_spread(_rate(run) for run in one.runs),
        seed_spread(_dropped(run) for run in one.runs),
    )


def _rate(run: Run) -> float | None:
    curve = run.curves.get(TOKENS_PER_SECOND)
    logged = None if curve is None else float(np.median(curve.values))
    return logged if (whole := run.number(TOKENS_PER_SECOND)) is None else whole


def _dropped(run: Run) -> float | None:
    curve = run.curves.get(DROPPED_FRACTION)
    return None if curve is None else float(curve.values[-max(1, len(curve.values) // 10) :].mean())


def _notes(series: Sequence[Series], tokenizers: int, common: int | None, measure: QualityMetric) -> list[str]:
    notes = []
    if tokenizers > 1:
        notes.append(
            f"The runs read by {tokenizers} tokenizers: neg. log perplexities of different tokens say nothing of one "
            "another, so they are compared by bits a byte alone, of which fewer are better."
        )
    texts = [
        key for key in differences(series) if re.match(r"(data(?!\.(tokenizer|lanes|stream_shards))|tasks)\b", key)
    ]
    if texts:
        notes.append(
            f"The held-out text is not the same in all series, by {', '.join(texts[:KEYS])}"
            f"{', ...' if len(texts) > KEYS else ''}: figures of different texts say little of one another."
        )
    lacking = [run.name for one in series for run in one.runs if measure.figure not in run.curves]
    if lacking:
        notes.append(f"No {measure.title} is known of {', '.join(lacking)}: left out of the comparison.")
    if common is not None:
        notes.append(
            f"The runs are of different lengths: beside what each ends with, {measure.title} is given at step "
            f"{common:,}, the last at which all that were evaluated have it."
        )
    return notes


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else key, inner)
    else:
        yield path, value


def _json(value: SeedSpread | None) -> dict[str, float | None]:
    return dict.fromkeys(SeedSpread._fields) if value is None else value._asdict()
