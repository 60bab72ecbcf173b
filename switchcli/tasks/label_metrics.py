"""Metrics of answers that are labels, numbers or referents, as T5 computes them.

Scores lie between 0 and 100, correlations between -100 and 100.
An answer must equal the label in case, but spaces at its ends do not count. An answer that is not a label is wrong for
every target; where a metric counts classes, it is one more class. A score that is not defined, such as 0/0 or a
correlation with a constant, is 0. Metrics of free text are in `text_metrics`.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from switchcli.tasks.task import AnsweredExample, LabelMetric, Metric, uniform_chance
from switchcli.tasks.text_metrics import by_unit, sums_by_unit

Numbers = NDArray[np.float64]
NO_NUMBER: Final = -1.0
"""The value of an answer that is not a number, as in T5. It lies below STS-B's scale from 0 to 5."""
DETERMINERS: Final = {
    *("a", "an", "the", "this", "that", "these", "those", "which", "whose", "my", "your", "his", "her", "our", "their"),
    *("each", "every", "few", "many", "much", "some"),
}


def _percentage(numerator: float, denominator: float) -> float:
    return 100 * float(numerator / denominator) if denominator else 0.0


def _mean(units: Numbers) -> float:
    return _percentage(units[:, 0].sum(), len(units))


def _column(values: Sequence[bool]) -> Numbers:
    return np.array(values, np.float64).reshape(-1, 1)


# Accuracy


def counted_target(answer: AnsweredExample) -> str:
    """Return the target that the answer is, or the first one."""
    targets = [target.strip() for target in answer.example.targets]
    return answer.prediction.strip() if answer.prediction.strip() in targets else targets[0]


def _is_right(answer: AnsweredExample) -> bool:
    return answer.prediction.strip() == counted_target(answer)


ACCURACY = Metric(
    "accuracy",
    lambda answered: _column([_is_right(answer) for answer in answered]),
    _mean,
    is_exact=True,
    even_chance=uniform_chance,
)
"""The percentage of answers that are a target."""
EXACT_MATCH_BY_UNIT = Metric(
    "em", lambda answered: _column([all(map(_is_right, unit)) for unit in by_unit(answered)]), _mean, is_exact=True
)
"""The percentage of units whose answers are all right (MultiRC: of questions)."""


# F1 and Matthews correlation


def f1(negative: str, positive: str, name: str = "f1") -> Metric:
    """Return the F1 of the label `positive` over all answers.

    An answer that is neither label counts as the wrong one of the two, as in T5: it is a false positive if the target
    is negative.
    """

    def counts(answer: AnsweredExample) -> tuple[bool, bool, bool]:
        target = counted_target(answer)
        is_hit = answer.prediction.strip() == target
        return is_hit and target == positive, not is_hit and target == negative, not is_hit and target == positive

    def measure(answered: Sequence[AnsweredExample]) -> Numbers:
        """Return [units, 3]: true positives, false positives, false negatives."""
        return sums_by_unit(answered, counts)

    def combine(units: Numbers) -> float:
        true_positives, false_positives, false_negatives = units.sum(axis=0)
        return _percentage(2 * true_positives, 2 * true_positives + false_positives + false_negatives)

    return Metric(name, measure, combine, even_chance=uniform_chance)


def _class_counts(labels: tuple[str, ...], answered: Sequence[AnsweredExample]) -> Numbers:
    """Return [answers, 3 (k + 1)] for k labels and the class of answers that are not a label.

    Each row is three one-hot vectors, concatenated: the class that target and answer share (all zeros if they differ),
    the target's class, and the answer's class.
    """
    class_of = {label: index for index, label in enumerate(labels)}
    one_hot = np.eye(len(labels) + 1)
    target = one_hot[[class_of[counted_target(answer)] for answer in answered]]
    predicted = one_hot[[class_of.get(answer.prediction.strip(), len(labels)) for answer in answered]]
    return np.concatenate([target * predicted, target, predicted], axis=1)


def macro_f1(labels: tuple[str, ...]) -> Metric:
    """Return the mean F1 of the labels that occur as target or as answer.

    # Deviates: T5 counts a label that does not occur as 0, so that right answers alone would not score 100.
    """

    def combine(units: Numbers) -> float:
        # [3, k]: the counts of each label, without the class of answers that are not a label.
        hits, target, predicted = units.sum(axis=0).reshape(3, -1)[:, : len(labels)]
        counts = zip(hits, target + predicted, strict=True)
        return float(np.mean([_percentage(2 * hit, both) for hit, both in counts if both]))

    return Metric("macro_f1", lambda answered: _class_counts(labels, answered), combine, even_chance=uniform_chance)


def matthews(labels: tuple[str, ...]) -> Metric:
    """Return the Matthews correlation, which is Gorodkin's R_k for k labels (Gorodkin 2004).

    Answers that are not a label are one more class, which is never the target.
    """

    def combine(units: Numbers) -> float:
        hits, target, predicted = units.sum(axis=0).reshape(3, -1)  # [k + 1] each
        total = target.sum()
        variances = (total**2 - target @ target) * (total**2 - predicted @ predicted)
        return _percentage(float(hits.sum() * total - target @ predicted), math.sqrt(variances))

    return Metric("matthews", lambda answered: _class_counts(labels, answered), combine, even_chance=lambda k: 0.0)


# Correlations of numbers


def number_in(text: str) -> float | None:
    """Return the finite number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number(text: str) -> float:
    value = number_in(text)
    return NO_NUMBER if value is None else value


def _pairs(answered: Sequence[AnsweredExample]) -> Numbers:
    """Return [answers, 2]: the number in the target, which T5 rounds for STS-B, and the number in the answer."""
    return np.array([[_number(answer.example.targets[0]), _number(answer.prediction)] for answer in answered])


def _correlation(x: Numbers, y: Numbers) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    # Answers may be any finite numbers, such as 1e308. Scaling to [-1, 1] keeps their squares from overflowing.
    x, y = (values / np.abs(values).max() for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    return max(-100.0, min(100.0, _percentage(float(x @ y), float(np.linalg.norm(x) * np.linalg.norm(y)))))


def _ranks(values: Numbers) -> Numbers:
    """Return ranks from 1; equal values have the mean of their ranks."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    # A distinct value that occurs c times, with n values up to and including it, has the ranks n - c + 1 to n.
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


PEARSON = Metric("pearson", _pairs, lambda units: _correlation(units[:, 0], units[:, 1]), needs_numbers=True)
"""Pearson's correlation of targets and answers, read as numbers; NO_NUMBER replaces what is not a finite number."""
SPEARMAN = Metric(
    "spearman", _pairs, lambda units: _correlation(_ranks(units[:, 0]), _ranks(units[:, 1])), needs_numbers=True
)
"""Pearson's correlation of the ranks."""


# Referents


def names_referent(prediction: str, referent: str) -> bool | None:
    """Return whether a prediction names the referent, or None if it names nothing (T5's rule for WSC and WNLI).

    Both name the same if the words of one are a subset of the other's. Case, spaces at the ends and determiners do not
    count. If only one of them has an apostrophe, they differ: `Bob's hat` is not `Bob`.

    None means that no word of the prediction is left, as in an empty answer or `the`. Such an answer judges nothing, so
    it is wrong for every label: counting it as "does not name the referent" would make it right for each label `False`.
    """
    predicted, expected = _without_determiners(prediction), _without_determiners(referent)
    if not predicted:
        return None
    if ("'" in predicted) != ("'" in expected):
        return False
    predicted_words, expected_words = {*predicted.split(" ")}, {*expected.split(" ")}
    return predicted_words <= expected_words or expected_words <= predicted_words


def _without_determiners(phrase: str) -> str:
    """Return the phrase in lower case without determiners, split at single spaces only, as T5 does."""
    return " ".join(word for word in phrase.strip().lower().split(" ") if word not in DETERMINERS)


def _judgments(answered: Sequence[AnsweredExample]) -> Numbers:
    """Return [answers, 1]: 1 if the judgment is the label. T5 writes judgments as 1, 0 and -1 for True, False, None."""
    judged = [str(names_referent(answer.prediction, answer.example.targets[0])) for answer in answered]
    return _column([judgment == answer.example.label for judgment, answer in zip(judged, answered, strict=True)])


REFERENT_ACCURACY = Metric("accuracy", _judgments, _mean, is_exact=True)
"""The percentage of answers whose judgment agrees with `Example.label`.

The judgment is `True` if the answer names the target, else `False`. An answer without words, or with determiners only,
agrees with neither label."""


METRICS: Mapping[str, Metric | LabelMetric] = MappingProxyType(
    {
        "accuracy": ACCURACY,
        "f1": LabelMetric(lambda labels: f1(*labels), needs=2),  # the second label is the positive one
        "macro_f1": LabelMetric(macro_f1),
        "matthews": LabelMetric(matthews),
        "pearson": PEARSON,
        "spearman": SPEARMAN,
    }
)
"""Metrics that a user's own task may name."""
