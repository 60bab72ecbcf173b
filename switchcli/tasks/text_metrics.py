"""Metrics of free text, as T5 computes them: exact match, token F1, ROUGE and BLEU, each from 0 to 100.

They agree with the evaluation scripts of SQuAD and TriviaQA and with the packages rouge_score and sacrebleu. Of several
right answers, the one that scores best counts. An answer's unit is its `Example.unit`, or the answer alone.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from switchcli.tasks.task import AnsweredExample, Metric, indices_by_unit, uniform_chance

Numbers = NDArray[np.float64]
TRIVIA_PUNCTUATION: Final = string.punctuation + "‘’´`"  # noqa: RUF001 - the characters of TriviaQA's script
BLEU_ORDERS: Final = 4

# Normal forms


def squad_normal(text: str) -> str:
    """Return the text in lower case without ASCII punctuation (`U.S.` is `us`) and articles, with single spaces."""
    return _remove_articles(text.lower().translate(str.maketrans("", "", string.punctuation)))


def trivia_normal(text: str) -> str:
    """Return SQuAD's normal form, but with a space for each punctuation mark and typographic quote: `U.S.` is `u s`."""
    spaces = str.maketrans(TRIVIA_PUNCTUATION, " " * len(TRIVIA_PUNCTUATION))
    return _remove_articles(text.lower().translate(spaces))


def plain_normal(text: str) -> str:
    """Return the text with single spaces and in Unicode's form NFKC, as T5's vocabulary does before it encodes."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _remove_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# Means over answers


def by_unit(answered: Sequence[AnsweredExample]) -> list[list[AnsweredExample]]:
    """Return the answers of each unit, with units in order of their first answer."""
    units = indices_by_unit(answer.example for answer in answered)
    return [[answered[index] for index in unit] for unit in units]


def sums_by_unit(answered: Sequence[AnsweredExample], numbers: Callable[[AnsweredExample], Sequence[float]]) -> Numbers:
    """Return [units, numbers]: the sum of the `numbers` of each answer over the answers of a unit."""
    rows = [[sum(column) for column in zip(*map(numbers, unit), strict=True)] for unit in by_unit(answered)]
    return np.array(rows, np.float64)


def mean_of(name: str, score: Callable[[str, str], float]) -> Metric:
    """Return the metric that is the mean over answers of `score(target, prediction)`, taken for the best target.

    `score` lies from 0 to 1. The metric's numbers are, for each unit, the sum of its scores and their count.
    """

    def best(answer: AnsweredExample) -> float:
        return max(score(target, answer.prediction) for target in answer.example.targets)

    def combine(units: Numbers) -> float:
        total, count = units.sum(axis=0)
        return 100 * float(total / count)

    return Metric(name, lambda answered: sums_by_unit(answered, lambda answer: (best(answer), 1)), combine)


def exact_match_of(normal: Callable[[str], str]) -> Metric:
    """Return the metric that is the fraction of answers equal to a target after `normal`."""
    metric = mean_of("em", lambda target, prediction: normal(target) == normal(prediction))
    return metric._replace(is_exact=True, even_chance=uniform_chance)


def f1_of(normal: Callable[[str], str]) -> Metric:
    """Return the mean F1 of the words after `normal`, with repeated words counted."""
    return mean_of(
        "f1", lambda target, prediction: _f1(Counter(normal(target).split()), Counter(normal(prediction).split()))
    )


def _f1(target: Counter[Any], prediction: Counter[Any]) -> float:
    """Return the F1 of two multisets: twice the size of their intersection over the sum of their sizes; 0 for 0/0."""
    matches = (target & prediction).total()
    return 2 * matches / (target.total() + prediction.total()) if matches else 0.0


squad_em, squad_f1 = exact_match_of(squad_normal), f1_of(squad_normal)
trivia_em, trivia_f1 = exact_match_of(trivia_normal), f1_of(trivia_normal)
exact_match = exact_match_of(plain_normal)


# ROUGE (Lin 2004), without stemming. T5 reports the median of a bootstrap. We report the mean, which is close to it.


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _sentences(summary: str) -> list[list[str]]:
    """Return the words of each line; ` . ` ends a line too, because tokenized summaries write it so (T5's rule)."""
    return [_words(sentence) for sentence in re.split(r"\n| \. ", summary)]


def _ngrams(text: str, order: int) -> Counter[Any]:
    words = _words(text)
    # The n-gram at position i has one word from each of `order` copies of the words, copy k shifted by k.
    return Counter(zip(*(words[shift:] for shift in range(order)), strict=False))


def rouge_n(order: int) -> Metric:
    """Return ROUGE-N: the mean F1 of n-grams of `order` words (Lin 2004, section 2)."""
    return mean_of(f"rouge{order}", lambda target, prediction: _f1(_ngrams(target, order), _ngrams(prediction, order)))


def _lcs_positions(target: Sequence[str], prediction: Sequence[str]) -> list[int]:
    """Return the positions in `target` of a longest common subsequence with `prediction`, the last position first.

    Of several such subsequences this is the one that rouge_score takes.
    """
    # lengths[i][j] is the length of the longest common subsequence of target[:i] and prediction[:j].
    lengths = [[0] * (len(prediction) + 1)]
    for word in target:
        above, row = lengths[-1], [0]
        for j, other in enumerate(prediction):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    positions = []
    i, j = len(target), len(prediction)
    while i and j:
        if target[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            positions.append(i)
        elif lengths[i][j - 1] > lengths[i - 1][j]:
            j -= 1
        else:
            i -= 1  # also on a tie: it decides which positions are returned, and so the union in `_lcs_f1`
    return positions


def _lcs_f1(target: Sequence[Sequence[str]], prediction: Sequence[Sequence[str]]) -> float:
    """Return the F1 of a summary of sentences by the union of common subsequences (Lin 2004, section 3.2)."""
    matched: Counter[str] = Counter()
    for sentence in target:
        positions: set[int] = set().union(*(_lcs_positions(sentence, other) for other in prediction))
        matched.update(sentence[position] for position in positions)
    target_length, prediction_words = sum(map(len, target)), Counter(word for other in prediction for word in other)
    # A word of the prediction matches once, even if it is part of the unions of several sentences (as in ROUGE 1.5.5).
    matches = (matched & prediction_words).total()
    return 2 * matches / (target_length + prediction_words.total()) if matches else 0.0


rouge1, rouge2 = rouge_n(1), rouge_n(2)
rouge_l = mean_of("rouge_l", lambda target, prediction: _lcs_f1([_words(target)], [_words(prediction)]))
"""ROUGE-L of the whole text as one sentence (Lin 2004, section 3.1)."""
rouge_lsum = mean_of("rouge_lsum", lambda target, prediction: _lcs_f1(_sentences(target), _sentences(prediction)))


# BLEU


def _bleu_class() -> Any:
    """Return sacrebleu's BLEU. Raises ImportError if the extra `tasks` is not installed."""
    from sacrebleu.metrics import BLEU

    return BLEU


def _bleu_measure(answered: Sequence[AnsweredExample]) -> Numbers:
    """Return [units, 10]: lengths of prediction and nearest target, then matched and all n-grams of orders 1 to 4."""
    # The effective order changes the score of a sentence and not its counts. Without it each sentence logs a warning.
    scorer = _bleu_class()(tokenize="intl", effective_order=True)

    def counts(answer: AnsweredExample) -> list[float]:
        score = scorer.sentence_score(answer.prediction, list(answer.example.targets))
        return [score.sys_len, score.ref_len, *score.counts, *score.totals]

    return sums_by_unit(answered, counts)


def _bleu_combine(units: Numbers) -> float:
    predicted_length, target_length, *counts = (int(total) for total in units.sum(axis=0))
    matches, ngrams = counts[:BLEU_ORDERS], counts[BLEU_ORDERS:]
    bleu = _bleu_class().compute_bleu(matches, ngrams, predicted_length, target_length, smooth_method="exp")
    return float(bleu.score)


bleu = Metric("bleu", _bleu_measure, _bleu_combine, import_packages=_bleu_class)
"""BLEU of the whole set by sacrebleu with T5's settings: tokenizer `intl`, case kept, exponential smoothing."""

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "exact_match": exact_match,
        "squad_em": squad_em,
        "squad_f1": squad_f1,
        "trivia_em": trivia_em,
        **{metric.name: metric for metric in (rouge1, rouge2, rouge_l, rouge_lsum, bleu)},
    }
)
"""Metrics that a user's own task may name."""
