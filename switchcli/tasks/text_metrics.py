"""Metrics of free text, as T5 computes them: exact match, token F1, ROUGE and BLEU, each from 0 to 100.

They agree with the evaluation scripts of SQuAD and TriviaQA and with the packages rouge_score and sacrebleu, which are
imported when the first answer is measured. With several right answers the best counts. An answer's unit is its
`Example.unit`, or the answer alone. ReCoRD is scored by `squad_em` and `squad_f1`, as in T5.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from switchcli.tasks.task import AnsweredExample, Metric

Numbers = NDArray[np.float64]
TRIVIA_PUNCTUATION = string.punctuation + "‘’´`"  # noqa: RUF001 - as TriviaQA's script has it
BLEU_ORDERS = 4

# Normal forms


def squad_normal(text: str) -> str:
    """Lower case; no ASCII punctuation, so that `U.S.` is `us`; no articles; single spaces."""
    return _without_articles(text.lower().translate(str.maketrans("", "", string.punctuation)))


def trivia_normal(text: str) -> str:
    """As SQuAD's, but a space for each punctuation mark, typographic quotes among them: `U.S.` is `u s`."""
    spaces = str.maketrans(TRIVIA_PUNCTUATION, " " * len(TRIVIA_PUNCTUATION))
    return _without_articles(text.lower().translate(spaces))


def plain_normal(text: str) -> str:
    """Single spaces, and one way to write a character (NFKC): what T5's vocabulary cannot tell apart."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


# Means over answers


def by_unit(answered: Sequence[AnsweredExample]) -> list[list[AnsweredExample]]:
    """The answers of each unit, units in order of their first answer."""
    units: dict[str | int, list[AnsweredExample]] = {}
    for number, each in enumerate(answered):
        units.setdefault(each.example.unit or number, []).append(each)
    return list(units.values())


def mean_of(name: str, best: Callable[[Sequence[str], str], float]) -> Metric:
    """The mean over answers of `best(targets, prediction)`, which lies from 0 to 1; of a unit the sum and the count."""

    def measure(answered: Sequence[AnsweredExample]) -> Numbers:
        units = by_unit(answered)
        sums = [[sum(best(each.example.targets, each.prediction) for each in unit), len(unit)] for unit in units]
        return np.array(sums, np.float64)

    def combine(numbers: Numbers) -> float:
        total, count = numbers.sum(0)
        return 100 * float(total / count)

    return Metric(name, measure, combine)


def exact_match_of(normal: Callable[[str], str]) -> Metric:
    """The share of answers that are a target after `normal`."""
    metric = mean_of("em", lambda targets, prediction: normal(prediction) in map(normal, targets))
    return metric._replace(is_exact=True, has_even_chance=True)


def f1_of(normal: Callable[[str], str]) -> Metric:
    """The F1 of words after `normal`, each word as often as it stands there; 0 where no word is shared."""

    def best(targets: Sequence[str], prediction: str) -> float:
        words = Counter(normal(prediction).split())
        return max(_overlap(Counter(normal(target).split()), words) for target in targets)

    return mean_of("f1", best)


def _overlap(target: Counter[str], prediction: Counter[str]) -> float:
    shared = (target & prediction).total()
    return 2 * shared / (target.total() + prediction.total()) if shared else 0.0


squad_em, squad_f1 = exact_match_of(squad_normal), f1_of(squad_normal)
trivia_em, trivia_f1 = exact_match_of(trivia_normal), f1_of(trivia_normal)
exact_match = exact_match_of(plain_normal)


# ROUGE


def rouge_of(kind: str) -> Metric:
    """The mean F of rouge_score's `kind`, without stemming. T5 reports the middle of a bootstrap, which is about the
    mean; we report the mean."""

    def measure(answered: Sequence[AnsweredExample]) -> Numbers:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind])

        def best(targets: Sequence[str], prediction: str) -> float:
            lines = [_sentences_in_lines(target) for target in targets]
            return float(scorer.score_multi(lines, _sentences_in_lines(prediction))[kind].fmeasure)

        return mean_of(kind, best).measure(answered)

    return Metric(kind, measure, squad_em.combine)


def _sentences_in_lines(summary: str) -> str:
    """T5's rule for rougeLsum, which takes a line for a sentence: tokenized text ends its sentences in ` . `."""
    return summary.replace(" . ", " .\n")


rouge1, rouge2, rouge_lsum = rouge_of("rouge1"), rouge_of("rouge2"), rouge_of("rougeLsum")


# BLEU


def _bleu_measure(answered: Sequence[AnsweredExample]) -> Numbers:
    """[units, 10]: the lengths of prediction and nearest target, then matched and all n-grams by their order."""
    from sacrebleu.metrics import BLEU

    # The effective order changes a sentence's score and not its counts; without it each sentence would log a warning.
    scorer = BLEU(tokenize="intl", effective_order=True)

    def counts(each: AnsweredExample) -> list[float]:
        of = scorer.sentence_score(each.prediction, list(each.example.targets))
        return [of.sys_len, of.ref_len, *of.counts, *of.totals]

    return np.array([np.sum([counts(each) for each in unit], 0) for unit in by_unit(answered)], np.float64)


def _bleu_combine(numbers: Numbers) -> float:
    from sacrebleu.metrics import BLEU

    sys_len, ref_len, *counts = (int(total) for total in numbers.sum(0))
    correct, total = counts[:BLEU_ORDERS], counts[BLEU_ORDERS:]
    return float(BLEU.compute_bleu(correct, total, sys_len, ref_len, smooth_method="exp").score)


bleu = Metric("bleu", _bleu_measure, _bleu_combine)
"""BLEU of the whole set by sacrebleu with T5's settings: tokenizer `intl`, case kept, exponential smoothing."""

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "exact_match": exact_match,
        "squad_em": squad_em,
        "squad_f1": squad_f1,
        "trivia_em": trivia_em,
        "rouge1": rouge1,
        "rouge2": rouge2,
        "rouge_lsum": rouge_lsum,
        "bleu": bleu,
    }
)
"""Metrics that a user's own task may name."""
