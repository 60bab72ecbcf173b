"""Scores: what a task's answers are worth, how sure that is, and what answering without a model would be worth.

All figures go to 100: shares from 0, correlations from -100. The intervals tell the spread from the choice of examples,
and not that from the seed of a training.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.tasks.task import AnsweredExample, Metric, Task

PERCENTILES = (2.5, 97.5)


class Score(NamedTuple):
    """A score and its 95 % interval: percentiles of a bootstrap that draws units again."""

    value: float
    low: float | None
    high: float | None
    """None where drawing again changes nothing: all units alike, or one alone, tell no spread."""


class Scores(NamedTuple):
    """All that is told of a task's answers."""

    task: str
    score: Score | None
    """The mean of the task's metrics, drawn together; None where no example is labelled."""
    metrics: dict[str, Score]
    beside: dict[str, Score]
    """Metrics that have no weight in the score."""
    num_examples: int
    num_units: int
    num_unlabelled: int
    """Examples whose answer the set keeps secret, which are in no other number but `malformed`."""
    malformed: float | None
    """The share of answers that are none of the labels; None for free text and for no answer at all."""
    chance: float
    majority: float | None
    """The score of always answering what is most often the first target of these very examples."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values by name."""
        plain = self._asdict()
        plain["score"] = self.score and self.score._asdict()
        for key in ("metrics", "beside"):
            plain[key] = {name: score._asdict() for name, score in plain[key].items()}
        return plain


def score(task: Task, answered: Sequence[AnsweredExample], draws: int = 1000, seed: int = 0) -> Scores:
    """The scores of a task's answers; the same answers, draws and seed give the same scores."""
    labelled = [each for each in answered if each.example.targets]
    wrong = [each.prediction.strip() not in task.labels for each in answered]
    malformed = 100 * sum(wrong) / len(wrong) if wrong and task.labels else None
    counts = (len(labelled), len(answered) - len(labelled))
    if not labelled:
        return Scores(task.name, None, {}, {}, counts[0], 0, counts[1], malformed, task.chance, None)
    every = (*task.metrics, *task.beside)
    numbers = [metric.measure(labelled) for metric in every]
    num_units = len(numbers[0])
    assert {len(of) for of in numbers} == {num_units}, f"{task.name}: the metrics do not agree on what a unit is"
    values = _combined(every, numbers)
    rng = np.random.default_rng(seed)
    drawn = [_combined(every, numbers, rng.integers(num_units, size=num_units)) for _ in range(draws)]
    table = np.array([values, *drawn])
    weighty = len(task.metrics)
    scores = {metric.name: _interval(table[:, at]) for at, metric in enumerate(every)}
    names = [metric.name for metric in every]
    return Scores(
        task=task.name,
        score=_interval(table[:, :weighty].mean(1)),
        metrics={name: scores[name] for name in names[:weighty]},
        beside={name: scores[name] for name in names[weighty:]},
        num_examples=counts[0],
        num_units=num_units,
        num_unlabelled=counts[1],
        malformed=malformed,
        chance=task.chance,
        majority=_majority(task, labelled),
    )


def is_right(task: Task, answer: AnsweredExample) -> bool | None:
    """Return whether an answer by itself is right, by the task's first exact metric; None if the task has none."""
    exact = next((metric for metric in (*task.metrics, *task.beside) if metric.is_exact), None)
    if exact is None:
        return None
    return exact.combine(exact.measure([answer])) == 100.0


def _combined(
    metrics: Sequence[Metric], numbers: Sequence[NDArray[np.float64]], units: NDArray[np.int64] | slice = slice(None)
) -> list[float]:
    return [metric.combine(of[units]) for metric, of in zip(metrics, numbers, strict=True)]


def _interval(column: NDArray[np.float64]) -> Score:
    """The first of a column is the score, the others are drawn. Of few units all draws may lie on one side of it."""
    value = float(column[0])
    if np.ptp(column) == 0.0:
        return Score(value, None, None)
    low, high = np.percentile(column[1:], PERCENTILES)
    return Score(value, min(value, float(low)), max(value, float(high)))


def _majority(task: Task, labelled: Sequence[AnsweredExample]) -> float:
    """Of targets equally frequent, the one that comes first."""
    [(most, _)] = Counter(each.example.targets[0] for each in labelled).most_common(1)
    constant = [AnsweredExample(each.example, most) for each in labelled]
    return float(np.mean([metric.combine(metric.measure(constant)) for metric in task.metrics]))
