"""Scores of a task's answers, with confidence intervals and the scores of baselines without a model.

All values go up to 100: fractions start at 0, correlations at -100. The intervals show the variance from the choice of
examples. They do not show the variance between training runs with different seeds.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.tasks.label_metrics import counted_target, number_in
from switchcli.tasks.task import AnsweredExample, Metric, Task

PERCENTILES: Final = (2.5, 97.5)
DRAWS: Final = 1000
"""Bootstrap resamples of an interval."""


class Score(NamedTuple):
    """A score and its 95 % confidence interval, from the percentiles of a bootstrap over units."""

    value: float
    """The score, up to 100."""
    low: float | None
    """The lower end of the interval. None, like `high`, if every resample has the same score, because all units are
    equal or there is only one."""
    high: float | None
    """The upper end of the interval."""


class LabelCounts(NamedTuple):
    """How the examples of a label were answered."""

    examples: int
    """Number of examples whose target it is. Of several targets the one that was answered counts, else the first."""
    answered: int
    """Number of examples that were answered with it."""
    right: int
    """Number of its examples that were answered with it."""
    confused_with: str | None
    """The most frequent wrong answer to its examples; None if there is none."""


class Scores(NamedTuple):
    """All results of a task's answers."""

    task: str
    """The name of the task."""
    score: Score | None
    """The mean of the task's metrics on the same resamples; None if no example is labeled."""
    metrics: dict[str, Score]
    """The score by each metric of the task, by the metric's name."""
    secondary_metrics: dict[str, Score]
    """Metrics that do not count in the score."""
    num_examples: int
    """Number of examples with labels."""
    num_units: int
    """Number of units that the intervals resample: examples, or groups of them where a metric counts groups."""
    num_unlabeled: int
    """Number of examples without a right answer, such as those that a benchmark keeps secret. Only `malformed` includes
    them."""
    malformed: float | None
    """Percentage of answers that are not one of the labels, or no number where numbers are compared; None for free text
    and if there are no answers."""
    chance: float
    """The score of random answers to these examples."""
    majority: float | None
    """The score of always answering the most frequent first target of these examples."""
    labels: Mapping[str, LabelCounts]
    """How the examples of each label were answered, by label; empty for free text."""

    @property
    def no_skill(self) -> float:
        """The score without skill: the better one of random answers and of the most frequent first target."""
        return max(self.chance, self.majority or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values by name."""
        fields = self._asdict()
        fields["score"] = self.score and self.score._asdict()
        for key in ("metrics", "secondary_metrics"):
            fields[key] = {name: score._asdict() for name, score in fields[key].items()}
        fields["labels"] = {label: counts._asdict() for label, counts in self.labels.items()}
        return fields


def score(task: Task, answered: Sequence[AnsweredExample], draws: int = DRAWS, seed: int = 0) -> Scores:
    """Return the scores of a task's answers. They depend only on the arguments.

    Args:
        draws: number of bootstrap resamples.
    """
    labeled = [answer for answer in answered if answer.example.targets]
    malformed = None
    if answered and (task.labels or any(metric.needs_numbers for metric in task.all_metrics)):
        malformed = 100 * sum(is_malformed(task, answer.prediction) for answer in answered) / len(answered)
    num_unlabeled = len(answered) - len(labeled)
    if not labeled:
        return Scores(task.name, None, {}, {}, 0, 0, num_unlabeled, malformed, task.chance, None, {})
    measured = [metric.measure(labeled) for metric in task.all_metrics]  # [units, numbers] for each metric
    num_units = len(measured[0])
    assert {len(units) for units in measured} == {num_units}, f"{task.name}: the metrics do not agree on what a unit is"
    rng = np.random.default_rng(seed)
    values = [_combine(task.all_metrics, measured)]
    for _ in range(draws):
        # All metrics use the same resample of units, so the interval of their mean accounts for their correlation.
        resample = rng.integers(num_units, size=num_units)
        values.append(_combine(task.all_metrics, [units[resample] for units in measured]))
    table = np.array(values)  # [1 + draws, metrics]; row 0 is the score itself
    num_counted = len(task.metrics)
    scores = {metric.name: _with_interval(table[:, index]) for index, metric in enumerate(task.all_metrics)}
    return Scores(
        task=task.name,
        score=_with_interval(table[:, :num_counted].mean(axis=1)),
        metrics={metric.name: scores[metric.name] for metric in task.metrics},
        secondary_metrics={metric.name: scores[metric.name] for metric in task.secondary_metrics},
        num_examples=len(labeled),
        num_units=num_units,
        num_unlabeled=num_unlabeled,
        malformed=malformed,
        chance=_chance(task, labeled),
        majority=_majority_score(task, labeled),
        labels=_label_counts(task, labeled),
    )


def is_malformed(task: Task, prediction: str) -> bool:
    """Return whether an answer is none of the task's labels; without labels, whether it is no number."""
    return prediction.strip() not in task.labels if task.labels else number_in(prediction) is None


def is_right(task: Task, answer: AnsweredExample) -> bool | None:
    """Return whether one answer is right by the task's first exact metric; None if the task has no exact metric."""
    exact = next((metric for metric in task.all_metrics if metric.is_exact), None)
    if exact is None:
        return None
    return exact.combine(exact.measure([answer])) == 100.0


def _combine(metrics: Sequence[Metric], measured: Sequence[NDArray[np.float64]]) -> list[float]:
    return [metric.combine(units) for metric, units in zip(metrics, measured, strict=True)]


def _with_interval(column: NDArray[np.float64]) -> Score:
    """Return the score in element 0 with its interval from the resamples in the other elements."""
    value = float(column[0])
    if np.ptp(column) == 0.0:
        return Score(value, None, None)
    low, high = np.percentile(column[1:], PERCENTILES)
    # With few units, all resamples may lie on one side of the score. The interval includes the score even then.
    return Score(value, min(value, float(low)), max(value, float(high)))


def _chance(task: Task, labeled: Sequence[AnsweredExample]) -> float:
    """Return the score of answers that are drawn uniformly from the labels: that of the mean numbers of each label."""
    if not task.labels or not all(metric.even_chance for metric in task.metrics):
        return task.chance
    labeled = labeled[: max(1, 1_000_000 // len(task.labels))]  # so that many labels take no minutes
    constants = [[AnsweredExample(answer.example, label) for answer in labeled] for label in task.labels]
    means = [np.mean([metric.measure(constant) for constant in constants], axis=0) for metric in task.metrics]
    return round(float(np.mean(_combine(task.metrics, means))), 9)  # a correlation of 1e-16 is 0


def _label_counts(task: Task, labeled: Sequence[AnsweredExample]) -> dict[str, LabelCounts]:
    """Return how the examples of each label were answered, by label."""
    by_target, answered = defaultdict[str, Counter[str]](Counter), Counter[str]()
    for answer in labeled:
        by_target[counted_target(answer)][answer.prediction.strip()] += 1
        answered[answer.prediction.strip()] += 1
    counts = {}
    for label in task.labels:
        answers = by_target[label]
        # One of the two most frequent answers is not the label itself, if there are two.
        confused_with = next((answer for answer, _ in answers.most_common(2) if answer != label), None)
        counts[label] = LabelCounts(answers.total(), answered[label], answers[label], confused_with)
    return counts


def _majority_score(task: Task, labeled: Sequence[AnsweredExample]) -> float:
    """Return the score of always answering the most frequent first target. On a tie, the first one counts."""
    [(most_frequent, _)] = Counter(answer.example.targets[0] for answer in labeled).most_common(1)
    constant = [AnsweredExample(answer.example, most_frequent) for answer in labeled]
    return float(np.mean([metric.combine(metric.measure(constant)) for metric in task.metrics]))
