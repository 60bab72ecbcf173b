"""Runs compared with a baseline: sizes, quality, speed-up, rate and dropped tokens of each series."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from switchcli.metric_names import DROPPED_FRACTION, HELD_OUT_BITS, HELD_OUT_LOSS, TOKENS_PER_SECOND
from switchcli.report.runs import Run
from switchcli.report.series import SeedSpread, Series, by_seed, differences, flatten, seed_spread
from switchcli.report.significance import Effect, Interval, Verdict, gain
from switchcli.report.speed import NO_SPEED, Cost, QualityMetric, Speed, Window, speed
from switchcli.report.task_results import task_scores
from switchcli.terminal.metrics_file import number

SIZES = ("parameters", "active_parameters", "flops_per_sequence")
_PLACES = ("train", "validation", "test")
"""The keys of a task that say where its data is."""
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
    over: Effect | None
    """Gain over the baseline, at the last evaluation that all runs have; positive is better."""
    verdict: Verdict | None
    """The verdict of the gain over the baseline; None where the series was not evaluated in training."""
    at_common: SeedSpread | None
    """The quality metric at the common step; None where all runs end there."""
    speed: Speed
    tokens_per_second: SeedSpread | None
    dropped: SeedSpread | None
    """Fraction of tokens dropped, over the last tenth of the logged steps."""

    def to_json(self) -> dict[str, Any]:
        """Return the row for scripts."""
        spreads = ("steps", "final", "at_common", TOKENS_PER_SECOND, "dropped")
        costs = zip(Cost._fields, self.speed.costs, self.speed.factors, strict=True)
        return {
            "series": self.label,
            "verdict": self.verdict,
            "seeds": self.seeds,
            "going_on": self.num_unfinished,
            **self.sizes,
            "over": judged_json(self.over),
            **{name: _json(getattr(self, name)) for name in spreads},
            "reached": self.speed.reached,
            "interpolated": ["to_quality"],
            "to_quality": {
                name: {
                    "cost": _json(cost),
                    "speed_up": judged_json(factor),
                    "verdict": None if factor is None else factor.verdict,
                }
                for name, cost, factor in costs
            },
        }

    def flat(self) -> dict[str, Any]:
        """Return the row for a file, one number per column, such as `to_quality.steps.cost.mean`."""
        return flatten(self.to_json())


@dataclass(frozen=True)
class Comparison:
    """All runs that trained, compared with the series of the baseline."""

    series: tuple[Series, ...]
    baseline: Series
    quality: float | None
    """The quality whose cost is compared; None for what each run's baseline run ends with."""
    evaluations: int
    """The number of evaluations that the quality metric is a mean over."""

    @property
    def labels(self) -> list[str]:
        return [series.label for series in self.series]

    @cached_property
    def compared(self) -> Mapping[str, Series]:
        """The series on the tasks of the baseline, by label. Losses of the other series are of other targets."""
        return {one.label: one for one in self.series if _tasks(one) == _tasks(self.baseline)}

    @property
    def num_tokenizers(self) -> int:
        tokenizers = {run.tokenizer for one in self.compared.values() for run in one.runs}
        return len(tokenizers - {None})

    @cached_property
    def metric(self) -> QualityMetric:
        """The held-out metric by which the runs are compared: bits per byte where they have several tokenizers."""
        if self.num_tokenizers > 1:
            return QualityMetric(HELD_OUT_BITS, "held-out bits per byte", self.evaluations)
        return QualityMetric(HELD_OUT_LOSS, "held-out loss", self.evaluations)

    @cached_property
    def _windows(self) -> list[tuple[float, list[Window]]]:
        """The step at which each run that was evaluated began, and its windows in order."""
        return [
            (run.began, [*values])
            for one in self.compared.values()
            for run in one.runs
            if (values := self.metric.measured(run))
        ]

    @cached_property
    def window(self) -> Window | None:
        """The last evaluations after the start of each run that all runs have: series are compared by these alone.

        None where there are none. A run that was evaluated only at its start takes no part.
        """
        in_training = [{window for window in windows if window[-1] > began} for began, windows in self._windows]
        in_training = [windows for windows in in_training if windows]
        return max(set.intersection(*in_training), default=None) if in_training else None

    @property
    def common_step(self) -> float | None:
        """The step of the window; None where there is none, or where all evaluated runs end there."""
        if self.window is None or all(windows[-1] == self.window for _, windows in self._windows):
            return None
        step = float(np.mean(self.window))
        return int(step) if step.is_integer() else step

    @cached_property
    def rows(self) -> tuple[SeriesRow, ...]:
        """The results of each series."""
        return tuple(map(self._row, self.series))

    def _row(self, series: Series) -> SeriesRow:
        runs = [*by_seed(series).values()]
        final = seed_spread(map(self.metric.at_end, runs))
        ours, theirs = self._at_window(series), self._at_window(self.baseline)
        over = gain(*({seed: -loss for seed, loss in losses.items()} for losses in (ours, theirs)))  # higher is better
        verdict = None if over is None else over.verdict
        cost = speed(series, self.baseline, self.metric, self.quality)
        if self.window is None and final is not None:
            verdict = Verdict.NO_COMMON_STEP
        if series.label not in self.compared:
            over, verdict, cost = None, Verdict.OTHER_TASKS, NO_SPEED
        sizes = {
            name: next((int(size) for run in runs if (size := run.number(name)) is not None), None) for name in SIZES
        }
        return SeriesRow(
            label=series.label,
            seeds=len(runs),
            num_unfinished=sum(not run.result for run in runs),
            sizes=sizes,
            steps=seed_spread(run.step for run in runs),
            final=final,
            over=over,
            verdict=Verdict.BASELINE if series is self.baseline else verdict,
            at_common=None if self.common_step is None else seed_spread(ours.values()),
            speed=cost,
            tokens_per_second=seed_spread(map(_tokens_per_second, runs)),
            dropped=seed_spread(map(_dropped_fraction, runs)),
        )

    @cached_property
    def task_gains(self) -> Mapping[str, Mapping[str, Effect]]:
        """The gain over the baseline in the score of each task that both have, by series and task."""
        scores = {one.label: {seed: task_scores(run) for seed, run in by_seed(one).items()} for one in self.series}
        theirs = scores.pop(self.baseline.label)
        found = {}
        for label, ours in scores.items():
            names = dict.fromkeys(name for by_name in ours.values() for name in by_name)
            effects = {name: gain(_of_task(ours, name), _of_task(theirs, name)) for name in names}
            if known := {name: effect for name, effect in effects.items() if effect is not None}:
                found[label] = known
        return found

    def _at_window(self, series: Series) -> dict[int | None, float]:
        """Return the quality metric over the window by seed, of the runs that have it."""
        window = self.window
        if window is None:
            return {}
        values = {seed: self.metric.measured(run) for seed, run in by_seed(series).items()}
        return {seed: of_run[window] for seed, of_run in values.items() if window in of_run}

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        """Yield what the reader has to know before the results are compared."""
        if self.num_tokenizers > 1:
            yield (
                f"The runs use {self.num_tokenizers} tokenizers: losses over different tokens cannot be compared, so "
                "the runs are compared by bits per byte alone, of which fewer are better."
            )
        text_key = re.compile(r"(data(?!\.(tokenizer|stream_shards))|tasks)\b")
        keys = [key for key in differences(self.series) if text_key.match(key)]
        # The keys that say where a text comes from are first, because other differences follow from them.
        keys.sort(key=lambda key: key.rpartition(".")[2] not in ("kind", "path", "paths", "name", "tasks"))
        if keys:
            yield (
                f"The held-out text is not the same in all series, by {named_keys(keys)}: metrics of different texts "
                "can hardly be compared."
            )
        unevaluated = [run.name for one in self.series for run in one.runs if self.metric.name not in run.curves]
        if unevaluated:
            yield f"No {self.metric.title} was logged by {', '.join(unevaluated)}: left out of the comparison."
        if self.window is None and len(self._windows) > 1:
            if all(windows[-1][-1] == began for began, windows in self._windows):
                yield "No run was evaluated after its start yet: nothing is compared."
            else:
                smoothed, fix = "", ""
                if self.evaluations > 1:
                    smoothed, fix = f", {self.evaluations} times in a row", "take a smaller --smooth, or "
                yield (
                    f"There is no step after the start of all runs at which all were evaluated{smoothed}, so that "
                    f"nothing is compared: {fix}give them equal eval.every_steps. A branch starts where its parent was."
                )


def compare(series: Sequence[Series], baseline: str | None, quality: float | None, evaluations: int) -> Comparison:
    """Compare series of runs that trained, at least one, with the series of the run `baseline`.

    None is the first series with a run that is complete, or the first of all.
    """
    complete = next((one for one in series if any(run.result for run in one.runs)), series[0])
    reference = next((one for one in series if baseline in {run.name for run in one.runs}), complete)
    return Comparison(tuple(series), reference, quality, evaluations)


def named_keys(keys: Sequence[str]) -> str:
    """Return the first keys of recipes for a note."""
    return ", ".join([*keys[:MAX_KEYS], *(["..."] if len(keys) > MAX_KEYS else [])])


def _of_task(scores: Mapping[int | None, Mapping[str, Any]], name: str) -> dict[int | None, float]:
    """Return the score of a task by seed, of the runs that have it."""
    return {seed: value for seed, of_run in scores.items() if (value := number(of_run.get(name))) is not None}


def _tasks(series: Series) -> set[str]:
    """Return the tasks that a series trained on, without where their data is; none for text."""
    tasks = series.runs[0].recipe.get("tasks")
    rules = [
        {key: value for key, value in task.items() if key not in _PLACES} if isinstance(task, Mapping) else task
        for task in (tasks if isinstance(tasks, list) else ())
    ]
    return {json.dumps(rule, sort_keys=True, default=str) for rule in rules}


def _tokens_per_second(run: Run) -> float | None:
    """Return the rate of the result, or the median of what was logged."""
    if (rate := run.number(TOKENS_PER_SECOND)) is not None:
        return rate
    curve = run.curves.get(TOKENS_PER_SECOND)
    return None if curve is None else float(np.median(curve.values))


def _dropped_fraction(run: Run) -> float | None:
    curve = run.curves.get(DROPPED_FRACTION)
    return None if curve is None else float(curve.values[-max(1, len(curve.values) // 10) :].mean())


def _json(value: SeedSpread | None) -> dict[str, float | None]:
    return dict.fromkeys(SeedSpread._fields) if value is None else value._asdict()


def judged_json(value: Effect | None) -> dict[str, float | None]:
    """Return the spread with the bounds of the 95 % interval, `low` and `high`; they are None without an interval."""
    spread, interval = (None, None) if value is None else (value.spread, value.interval)
    return {**_json(spread), **(dict.fromkeys(Interval._fields) if interval is None else interval._asdict())}
