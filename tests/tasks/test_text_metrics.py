"""Metrics of free text, against rouge_score and sacrebleu on whole corpora, cases by hand, and any text at all."""

import math
import string

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from switchcli.tasks.task import AnsweredExample, Example, Metric
from switchcli.tasks.text_metrics import (
    bleu,
    by_unit,
    exact_match,
    rouge1,
    rouge2,
    rouge_l,
    rouge_lsum,
    squad_em,
    squad_f1,
    squad_normal,
    trivia_em,
    trivia_f1,
    trivia_normal,
)

METRICS = (squad_em, squad_f1, trivia_em, trivia_f1, exact_match, rouge1, rouge2, rouge_l, rouge_lsum, bleu)
PREDICTIONS = [
    "The cat sat on the mat . It purred .",
    "a dog barks at the moon",
    "",
    "the quick brown fox jumped over the lazy dogs, then slept .",
    "Schönes Wetter heute «nicht» wahr?",
    "one",
]
TARGETS = [
    "The cat sat on a mat .\nIt was purring . Then it left .",
    "The dog barked at the moon",
    "nothing at all was said here",
    "The quick brown fox jumps over the lazy dog.",
    "Schönes Wetter heute «oder» nicht?",
    "one",
]
OTHERS = [text[::-1] if number % 2 else f"{text} indeed , and more" for number, text in enumerate(PREDICTIONS)]


def value(metric: Metric, answered: list[AnsweredExample]) -> float:
    return metric.combine(metric.measure(answered))


def answers(*targets: list[str]) -> list[AnsweredExample]:
    """PREDICTIONS, each with one target of every list."""
    return [
        AnsweredExample(Example("", of), said) for said, of in zip(PREDICTIONS, zip(*targets, strict=True), strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "squad", "trivia"),
    [
        ("The  cat", "cat", "cat"),
        ("A U.S. dollar!", "us dollar", "u s dollar"),
        ("an-other theme", "another theme", "other theme"),
        ("\u2018Tis the \u00b4day\u2019", "\u2018tis \u00b4day\u2019", "tis day"),
        ("snake_case", "snakecase", "snake case"),
        ("Atheneum, the", "atheneum", "atheneum"),
        ("the a an", "", ""),
        ("$1,000", "1000", "1 000"),
        ("\tÉté\u00a0İ ", "été i̇", "été i̇"),
    ],
)
def test_normal_forms(text: str, squad: str, trivia: str) -> None:
    assert (squad_normal(text), trivia_normal(text)) == (squad, trivia)


@pytest.mark.parametrize(
    ("metric", "prediction", "targets", "expected"),
    [
        (squad_em, "a big  Moose!", ("hippo", "big moose"), 1),
        (squad_em, "wrong", ("correct",), 0),
        (squad_em, "", ("the",), 1),
        (squad_em, "U S", ("U.S.",), 0),
        (trivia_em, "U S", ("U.S.",), 1),
        (trivia_em, "rock\u2019n\u2019roll", ("Rock n Roll",), 1),
        (exact_match, " dry  palms\n", ("dry palms",), 1),
        (exact_match, "Dry palms", ("dry palms",), 0),
        (exact_match, "100oC CO2", ("100ºC CO₂",), 1),
        (squad_f1, "abd", ("abc abd", "$$$$"), 2 / 3),
        (squad_f1, "a b b c", ("b b b",), 2 * 2 / (3 + 3)),
        (squad_f1, "x b", ("the b c d", "b", "b y"), 2 / 3),
        (squad_f1, "", ("the",), 0),  # as in SQuAD's script: no word is shared
        (trivia_f1, "new-york city", ("New York",), 0.8),
    ],
)
def test_answers_by_hand(metric: Metric, prediction: str, targets: tuple[str, ...], expected: float) -> None:
    assert value(metric, [AnsweredExample(Example("", targets), prediction)]) == pytest.approx(100 * expected)


def test_a_mean_weighs_answers_and_not_units() -> None:
    def answer(right: bool, unit: str) -> AnsweredExample:
        return AnsweredExample(Example("", ("yes",), unit), "yes" if right else "no")

    answered = [answer(True, "q"), answer(True, ""), answer(False, "q"), answer(True, "q"), answer(False, "")]
    assert squad_em.measure(answered).tolist() == [[2, 3], [1, 1], [0, 1]]
    assert value(squad_em, answered) == pytest.approx(60)
    assert [len(unit) for unit in by_unit(answered)] == [3, 1, 1]


ROUGE = (rouge1, rouge2, rouge_l, rouge_lsum)
# Few words, so that texts share many; line ends of both kinds, and letters that only look like those of a word.
ROUGE_TEXT = st.lists(
    st.sampled_from(["a", "b", "c", "A", "1", "d2", " . ", "\n", "\r\n", " ", "-", "é", "İ", "\u212a", "\ud800"]),
    max_size=40,
).map(" ".join) | st.text(alphabet="ab .\n", max_size=60)


def rouge_score_of(metric: Metric, answer: AnsweredExample) -> float:
    """Return the score of rouge_score, which takes a line for a sentence, as T5 calls it."""
    from rouge_score import rouge_scorer

    targets = [target.replace(" . ", " .\n") for target in answer.example.targets]
    name = metric.name.replace("_l", "L")
    scorer = rouge_scorer.RougeScorer([name])
    return scorer.score_multi(targets, answer.prediction.replace(" . ", " .\n"))[name].fmeasure


@pytest.mark.parametrize("metric", ROUGE, ids=lambda metric: metric.name)
def test_rouge_is_the_mean_of_rouge_score(metric: Metric) -> None:
    for answered in (answers(TARGETS), answers(TARGETS, OTHERS)):
        expected = 100 * np.mean([rouge_score_of(metric, answer) for answer in answered])
        assert value(metric, answered) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("metric", ROUGE, ids=lambda metric: metric.name)
@given(targets=st.lists(ROUGE_TEXT, min_size=1, max_size=2), prediction=ROUGE_TEXT)
@example(targets=["a a"], prediction="a b\nb a")  # each sentence matches either word: rouge_score takes both
@settings(max_examples=100, deadline=None)
def test_rouge_of_random_words_is_that_of_rouge_score(metric: Metric, targets: list[str], prediction: str) -> None:
    answer = AnsweredExample(Example("", tuple(targets)), prediction)
    assert value(metric, [answer]) == pytest.approx(100 * rouge_score_of(metric, answer), rel=1e-12, abs=1e-12)


def test_rouge_by_hand() -> None:
    """Three of four words and, of pairs, one of three are shared; the sentences of Lsum may change places."""
    said = [AnsweredExample(Example("", ("police killed the gunman",)), "the gunman police killed it")]
    assert value(rouge1, said) == pytest.approx(100 * 2 * 4 / (4 + 5))
    assert value(rouge2, said) == pytest.approx(100 * 2 * 2 / (3 + 4))
    turned = [AnsweredExample(Example("", ("it rains . he sleeps .",)), "he sleeps . it rains .")]
    assert value(rouge_lsum, turned) == 100
    assert value(rouge1, [AnsweredExample(Example("", ("running",)), "run")]) == 0  # no stemming


@pytest.mark.parametrize("references", [(TARGETS,), (TARGETS, OTHERS), (OTHERS, TARGETS, OTHERS)])
def test_bleu_is_sacrebleus(references: tuple[list[str], ...]) -> None:
    from sacrebleu.metrics import BLEU

    settings_of_t5 = {"tokenize": "intl", "smooth_method": "exp", "force": False, "lowercase": False}
    expected = BLEU(**settings_of_t5, effective_order=False).corpus_score(PREDICTIONS, list(references)).score
    assert value(bleu, answers(*references)) == pytest.approx(expected)


def test_bleu_is_smoothed_and_of_the_whole_set() -> None:
    """No four words in a row are right, and the mean of the sentences' own scores is another figure."""
    from sacrebleu.metrics import BLEU

    targets, said = ["the cat is on the mat", "there is a cat"], ["the cat sat on the mat", "here is a dog"]
    answered = [AnsweredExample(Example("", (target,)), text) for target, text in zip(targets, said, strict=True)]
    assert value(bleu, answered) == pytest.approx(BLEU(tokenize="intl").corpus_score(said, [targets]).score)
    assert 0 < value(bleu, answered) < 100
    assert bleu.measure(answered)[:, :2].tolist() == [[6, 6], [4, 4]]
    assert value(bleu, [AnsweredExample(Example("", (target,)), target) for target in targets]) == pytest.approx(100)


def test_units_are_measured_apart_and_in_order() -> None:
    """What is measured of a part is that part of what is measured of all, so that units can be drawn again."""
    for metric in METRICS:
        whole = metric.measure(answers(TARGETS, OTHERS))
        assert whole.dtype == np.float64
        parts = [metric.measure([each]) for each in answers(TARGETS, OTHERS)]
        np.testing.assert_array_equal(whole, np.concatenate(parts))
        assert math.isfinite(metric.combine(whole[[2, 2]])), "an empty answer alone"


TEXT = st.text(max_size=40) | st.text(alphabet=string.ascii_letters + " .,'\n\u2019", max_size=40)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@given(pairs=st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=4))
@settings(max_examples=30)
def test_any_text_has_a_score(metric: Metric, pairs: list[tuple[str, list[str]]]) -> None:
    answered = [AnsweredExample(Example("", tuple(targets)), said) for said, targets in pairs]
    assert 0 <= value(metric, answered) <= 100 + 1e-9
    right = [AnsweredExample(Example("", (said, *targets)), said) for said, targets in pairs]
    assert value(metric, answered) <= value(metric, right) + 1e-9


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("said", ["", " ", "\0", "\ud800", "a " * 5000, "<extra_id_0>", "\u202e[/x]"])
def test_absurd_answers_have_a_score(metric: Metric, said: str) -> None:
    assert 0 <= value(metric, [AnsweredExample(Example("", ("a right answer", "")), said)]) <= 100
