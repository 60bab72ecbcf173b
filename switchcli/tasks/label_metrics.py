"""Scores of answers that are labels, numbers or referents, from 0 to 100 (correlations from -100), as T5 computes them.

A label is right as it stands: spaces around it do not count, its case does, as T5 compares the decoded text with the
label. What is no label is the class -1: wrong, whatever the target is. A score that is not defined, as 0/0 or the
correlation of a constant, is 0. Scores of free text are not here.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from switchcli.tasks.task import AnsweredExample, LabelMetric, Metric
from switchcli.tasks.text_metrics import by_unit

Numbers = NDArray[np.float64]
NO_NUMBER = -1.0
"""What an answer without a number is read as (T5): it lies below the scale of STS-B, from 0 to 5."""
DETERMINERS = {
    *("a", "an", "the", "this", "that", "these", "those", "which", "whose", "my", "your", "his", "her", "our", "their"),
    *("each", "every", "few", "many", "much", "some"),
}


def _ratio(part: float, whole: float) -> float:
    return 100 * float(part / whole) if whole else 0.0


def _share(units: Numbers) -> float:
    return _ratio(units[:, 0].sum(), len(units))


def _column(values: Sequence[bool]) -> Numbers:
    return np.array(values, np.float64).reshape(-1, 1)


# Accuracy


def _is_right(answer: AnsweredExample) -> bool:
    return answer.prediction.strip() in [target.strip() for target in answer.example.targets]


def _all_right(answered: Sequence[AnsweredExample]) -> Numbers:
    return _column([all(map(_is_right, unit)) for unit in by_unit(answered)])


ACCURACY = Metric(
    "accuracy",
    lambda answered: _column([_is_right(answer) for answer in answered]),
    _share,
    is_exact=True,
    has_even_chance=True,
)
"""The share of answers that are the target."""
EXACT_MATCH_BY_UNIT = Metric("em", _all_right, _share, is_exact=True)
"""The share of units whose answers are all right (MultiRC: of questions)."""


# F1 and Matthews correlation


def f1(negative: str, positive: str, name: str = "f1") -> Metric:
    """F1 of `positive`, over all answers; those of one unit are drawn together.

    An answer that is neither label counts as the wrong one of the two, as in T5: to a negative target it is a false
    positive.
    """

    def counts(answer: AnsweredExample) -> tuple[bool, bool, bool]:
        right, said = answer.example.targets[0].strip(), answer.prediction.strip()
        hit = said == right
        return hit and right == positive, not hit and right == negative, not hit and right == positive

    def measure(answered: Sequence[AnsweredExample]) -> Numbers:
        """[units, 3]: true positives, false positives, false negatives."""
        return np.array([np.sum([counts(answer) for answer in unit], axis=0) for unit in by_unit(answered)], np.float64)

    def combine(units: Numbers) -> float:
        hits, too_many, too_few = units.sum(axis=0)
        return _ratio(2 * hits, 2 * hits + too_many + too_few)

    return Metric(name, measure, combine, has_even_chance=True)


def _counts(labels: tuple[str, ...], answered: Sequence[AnsweredExample]) -> Numbers:
    """[answers, 3 (k + 1)], for k labels and, last, what is none: whether each is hit, is right, is said."""
    number = {label: index for index, label in enumerate(labels)}
    one_hot = np.eye(len(labels) + 1)
    right = one_hot[[number[answer.example.targets[0].strip()] for answer in answered]]
    said = one_hot[[number.get(answer.prediction.strip(), len(labels)) for answer in answered]]
    return np.concatenate([right * said, right, said], axis=1)


def macro_f1(labels: tuple[str, ...]) -> Metric:
    """The mean of the F1 of each label; a label neither right nor said anywhere has 0."""

    def combine(units: Numbers) -> float:
        hits, right, said = units.sum(axis=0).reshape(3, -1)[:, : len(labels)]
        return float(np.mean([_ratio(2 * hit, both) for hit, both in zip(hits, right + said, strict=True)]))

    return Metric("macro_f1", lambda answered: _counts(labels, answered), combine, has_even_chance=True)


def matthews(labels: tuple[str, ...]) -> Metric:
    """Matthews correlation, for k labels Gorodkin's R_k; what is no label is one more class that is never right."""

    def combine(units: Numbers) -> float:
        hits, right, said = units.sum(axis=0).reshape(3, -1)
        total = right.sum()
        spread = (total**2 - right @ right) * (total**2 - said @ said)
        return _ratio(hits.sum() * total - right @ said, math.sqrt(spread))

    return Metric("matthews", lambda answered: _counts(labels, answered), combine)


# Correlations of numbers


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return NO_NUMBER
    return value if math.isfinite(value) else NO_NUMBER


def _pairs(answered: Sequence[AnsweredExample]) -> Numbers:
    """[answers, 2]: the target's number, so STS-B's rounded score as in T5, and the answer's."""
    return np.array([[_number(answer.example.targets[0]), _number(answer.prediction)] for answer in answered])


def _correlation(x: Numbers, y: Numbers) -> float:
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    # Any finite numbers may come, as 1e308: brought to [-1, 1] first, no square of theirs overflows.
    x, y = (values / np.abs(values).max() for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    return max(-100.0, min(100.0, _ratio(float(x @ y), float(np.linalg.norm(x) * np.linalg.norm(y)))))


def _ranks(values: Numbers) -> Numbers:
    """From 1; equal values have the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


PEARSON = Metric("pearson", _pairs, lambda units: _correlation(units[:, 0], units[:, 1]))
"""Of targets and answers read as numbers; see NO_NUMBER for those that are none, or are not finite."""
SPEARMAN = Metric("spearman", _pairs, lambda units: _correlation(_ranks(units[:, 0]), _ranks(units[:, 1])))
"""Pearson's correlation of the ranks."""


# Referents


def names_referent(prediction: str, referent: str) -> bool | None:
    """Return whether a prediction names the referent, or None if it names nothing (T5's rule for WSC and WNLI).

    Both name the same if the words of one are a subset of the other's. Case, spaces at the ends and determiners do not
    count. If only one of them has an apostrophe, they differ: `Bob's hat` is not `Bob`.

    None means that no word of the prediction is left, as in an empty answer or `the`. Such an answer judges nothing, so
    it is wrong for every label: counting it as "does not name the referent" would make it right for each label `False`.
    """
    said, meant = _without_determiners(prediction), _without_determiners(referent)
    if not said:
        return None
    if ("'" in said) != ("'" in meant):
        return False
    said_words, meant_words = {*said.split(" ")}, {*meant.split(" ")}
    return said_words <= meant_words or meant_words <= said_words


def _without_determiners(phrase: str) -> str:
    """Return the phrase in lower case without determiners, split at single spaces only, as T5 does."""
    return " ".join(word for word in phrase.strip().lower().split(" ") if word not in DETERMINERS)


def _judged(answered: Sequence[AnsweredExample]) -> Numbers:
    """[answers, 1]: 1 where the judgement is the label. T5 writes it 1, 0 or -1, for True, False and None."""
    found = [str(names_referent(answer.prediction, answer.example.targets[0])) for answer in answered]
    return _column([said == answer.example.label for said, answer in zip(found, answered, strict=True)])


REFERENT_ACCURACY = Metric("accuracy", _judged, _share, is_exact=True)
"""Whether the answer names the target is a judgement, `True` or `False`: the share that agrees with `Example.label`.

An answer without words, or with determiners only, agrees with neither."""


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
