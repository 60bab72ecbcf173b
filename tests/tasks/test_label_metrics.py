"""Metrics of labels, numbers and referents, against scikit-learn 1.9 and scipy 1.17 or worked out by hand."""

import numpy as np
import pytest
from cpu_ratio import cpu_ratio
from hypothesis import given
from hypothesis import strategies as st

from switchcli.tasks.label_metrics import (
    ACCURACY,
    EXACT_MATCH_BY_UNIT,
    PEARSON,
    REFERENT_ACCURACY,
    SPEARMAN,
    f1,
    macro_f1,
    matthews,
    names_referent,
)
from switchcli.tasks.task import AnsweredExample, Example, Metric

TWO, THREE = ("n", "p"), ("a", "b", "c")
ALL = (
    *(ACCURACY, EXACT_MATCH_BY_UNIT, f1(*TWO), macro_f1(TWO), matthews(TWO), PEARSON, SPEARMAN, REFERENT_ACCURACY),
    *(macro_f1(("n", "p", "q")), matthews(("n", "p", "q"))),
)


def answers(targets: str, predictions: str, units: str = "") -> list[AnsweredExample]:
    """Return answers from words separated by spaces; `-` is an empty prediction."""
    said = ["" if word == "-" else word for word in predictions.split()]
    of = units.split() or [""] * len(said)
    rows = zip(targets.split(), said, of, strict=True)
    return [AnsweredExample(Example("", (target,), unit), prediction) for target, prediction, unit in rows]


def score(metric: Metric, answered: list[AnsweredExample]) -> float:
    return metric.combine(metric.measure(answered))


@pytest.mark.parametrize(
    ("metric", "targets", "predictions", "figure"),
    [
        (ACCURACY, "n p p n", "n p n x", 50),
        # scikit-learn's f1_score and matthews_corrcoef
        (f1(*TWO), "n p p n p n p p", "n p n p p n p p", 80.0),
        (matthews(TWO), "n p p n p n p p", "n p n p p n p p", 46.666666666666664),
        # The same where three answers are no label: for F1 they are first set to the wrong label, as T5 does, and for
        # Matthews they are the class -1.
        (f1(*TWO), "n p p n p n p p", "n p n p x y p -", 44.44444444444444),
        (matthews(TWO), "n p p n p n p p", "n p n p x y p -", 8.451542547285165),
        # fbeta_score with labels 0 to 2 and average="macro", and matthews_corrcoef; two answers are no label.
        (macro_f1(THREE), "a a b b b c a c b a", "a b b b x c c - a a", 54.76190476190476),
        (matthews(THREE), "a a b b b c a c b a", "a b b b x c c - a a", 31.9681006545503),
        # c is neither a target nor said: scikit-learn's mean over the labels that occur, without the answer x.
        (macro_f1(THREE), "a a b b", "a b b x", (200 / 3 + 50) / 2),
        (macro_f1(THREE), "a a b b", "a b b c", (200 / 3 + 50 + 0) / 3),
        (macro_f1(THREE), "a a b b", "a a b b", 100),
        # scipy's pearsonr and spearmanr; "x" is -1.
        (PEARSON, "5.0 4.8 0.0 2.2 2.2 1.0", "4.6 x 0.2 2.2 3 0.2", 31.00044126556481),
        (SPEARMAN, "5.0 4.8 0.0 2.2 2.2 1.0", "4.6 x 0.2 2.2 3 0.2", 38.235294117647065),
        # By hand: the ranks are 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15); a straight line; a falling one.
        (SPEARMAN, "1.0 2.0 3.0 4.0", "0 3 2 900", 80),
        (PEARSON, "1.0 2.0 3.0", "3 5 7", 100),
        (PEARSON, "1.0 2.0 3.0", "3 2 1", -100),
    ],
)
def test_figures(metric: Metric, targets: str, predictions: str, figure: float) -> None:
    assert score(metric, answers(targets, predictions)) == pytest.approx(figure, abs=1e-9)


def test_multirc_counts_answers_for_f1_and_questions_for_exact_match() -> None:
    """Worked out by hand: questions u (all right), v (one of two wrong) and w (right); 3 true, 1 false positive, no
    miss."""
    answered = answers("True False True False True", "True False True True True", "u v w v u")
    f1a = f1("False", "True", name="f1a")
    assert f1a.name == "f1a"
    np.testing.assert_array_equal(f1a.measure(answered), [[2, 0, 0], [0, 1, 0], [1, 0, 0]])
    assert score(f1a, answered) == pytest.approx(100 * 6 / 7)
    np.testing.assert_array_equal(EXACT_MATCH_BY_UNIT.measure(answered), [[1], [0], [1]])
    assert score(EXACT_MATCH_BY_UNIT, answered) == pytest.approx(100 * 2 / 3)


def test_spaces_around_a_label_do_not_count_and_its_case_does() -> None:
    for metric in (ACCURACY, f1(*TWO), matthews(TWO), macro_f1(TWO)):
        spaced = [AnsweredExample(Example("", (target,)), f" {target}\n") for target in ("n", "p")]
        assert score(metric, spaced) == pytest.approx(100)
    assert score(ACCURACY, answers("True", "true")) == 0


@pytest.mark.parametrize("metric", [ACCURACY, f1(*TWO), macro_f1(TWO), matthews(TWO)], ids=lambda metric: metric.name)
def test_any_target_is_right(metric: Metric) -> None:
    assert (
        score(metric, [AnsweredExample(Example("", targets), targets[-1]) for targets in (("n", "p"), ("n",))]) == 100
    )


@pytest.mark.parametrize(
    ("prediction", "referent"), [("hat", "Bob's hat"), ("Bob's hat", "hat"), ("old hat", "the boy's old hat")]
)
def test_wsc_tells_a_phrase_with_an_apostrophe_from_one_without(prediction: str, referent: str) -> None:
    """T5's rule. The words of one are a subset of the other's, so that without the rule both would name the same."""
    for label, right in (("True", 0), ("False", 100)):
        answered = [AnsweredExample(Example("", (referent,), label=label), prediction)]
        assert score(REFERENT_ACCURACY, answered) == right


@pytest.mark.parametrize(
    ("metric", "targets", "predictions"),
    [
        (f1(*TWO), "n n", "n n"),
        (matthews(TWO), "n p", "n n"),
        (matthews(TWO), "p p", "n p"),
        (macro_f1(TWO), "n p", "x -"),
        (PEARSON, "0.2 0.4 4.0", "1.1 1.1 1.1"),
        (SPEARMAN, "0.2 0.4 4.0", "nan - inf"),
        (PEARSON, "0.2 0.2 0.2", "1 2 3"),
        (PEARSON, "0.2", "0.2"),
        (SPEARMAN, "0.2", "0.2"),
        (EXACT_MATCH_BY_UNIT, "n", "-"),
    ],
)
def test_what_is_not_defined_is_0(metric: Metric, targets: str, predictions: str) -> None:
    assert score(metric, answers(targets, predictions)) == 0


@pytest.mark.parametrize("wild", ["nan", "inf", "-Infinity", "1e999", "", "3.4.5", "three", "\ud800", "9" * 5000])
def test_what_is_no_finite_number_is_below_the_scale(wild: str) -> None:
    np.testing.assert_array_equal(PEARSON.measure([AnsweredExample(Example("", ("3.4",)), wild)]), [[3.4, -1]])


def test_huge_numbers_do_not_overflow() -> None:
    assert score(PEARSON, answers("1.0 2.0 3.0", "-1e308 0 1e308")) == pytest.approx(100)
    assert score(PEARSON, answers("1.0 2.0", "0 5e-324")) == pytest.approx(100)


@pytest.mark.parametrize(
    ("prediction", "referent", "same"),
    [
        ("The  Big dog", "the big dog", True),
        ("bunny", "the fuzzy bunny", True),
        ("my fuzzy old bunny", "fuzzy bunny", True),
        ("big cat", "big dog", False),
        ("Bob", "Bob's hat", False),
        ("bob's hat", "Bob's", True),
        ("bobby", "bob", False),
        ("dog.", "dog", False),
        # T5's own cases, and two spaces, between which there is an empty word
        ("potato", "turnip", False),
        ("a potato", "my potato", True),
        ("fuzzy bunny", "fuzzy hungry bunny", True),
        ("fuzzy  bunny", "fuzzy hungry bunny", False),
    ],
)
def test_two_phrases_name_the_same(prediction: str, referent: str, same: bool) -> None:
    assert names_referent(prediction, referent) is names_referent(referent, prediction) is same


def test_a_prediction_of_no_words_names_nothing_and_a_referent_of_none_is_not_named() -> None:
    assert names_referent("", "the dog") is names_referent("the", "the dog") is names_referent("", "") is None
    assert names_referent("dog", "those") is False


def test_wsc_compares_the_judgement_with_the_label() -> None:
    asked = [("the dog", "True"), ("the dog", "False"), ("Ann", "True"), ("Ann", "False")]
    answered = [AnsweredExample(Example("", (phrase,), label=label), "dog") for phrase, label in asked]
    np.testing.assert_array_equal(REFERENT_ACCURACY.measure(answered), [[1], [0], [0], [1]])
    assert score(REFERENT_ACCURACY, answered) == 50


# Whatever the answers are

PREDICTIONS = st.one_of(
    st.sampled_from(["n", "p", "q", " p ", "N", "", "-1", "2.4", "1e308", "-1e308"]),
    st.floats(allow_nan=True).map(str),
    st.text(),
)


@st.composite
def answered_lists(draw: st.DrawFn, metric: Metric) -> list[AnsweredExample]:
    targets = st.sampled_from(["0.2", "2.4", "5.0"] if metric in (PEARSON, SPEARMAN) else ["n", "p"])
    example = st.builds(
        lambda target, unit, label: Example("", (target,), unit, label),
        *(targets, st.sampled_from(["", "u", "v"]), st.sampled_from(["True", "False"])),
    )
    return draw(st.lists(st.builds(AnsweredExample, example, PREDICTIONS), min_size=1, max_size=12))


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
@given(data=st.data())
def test_any_text_has_a_score_within_bounds(metric: Metric, data: st.DataObject) -> None:
    answered = data.draw(answered_lists(metric))
    units = metric.measure(answered)
    assert units.dtype == np.float64
    assert units.ndim == 2
    assert np.isfinite(units).all()
    value = metric.combine(units)
    lowest = -100 if metric.name in ("pearson", "spearman", "matthews") else 0
    assert lowest - 1e-9 <= value <= 100 + 1e-9
    # Units drawn again, each as often as the others and in any order, are the same answers.
    again = np.random.default_rng(0).permutation(np.repeat(units, 3, axis=0))
    assert metric.combine(again) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_bootstrap_takes_seconds(metric: Metric) -> None:
    rng = np.random.default_rng(1)
    numbers = metric in (PEARSON, SPEARMAN)
    said = [f"{value:.1f}" if numbers else "np"[int(value > 0)] for value in rng.normal(size=5000)]
    units = metric.measure(
        [AnsweredExample(Example("", (said[place - 7],), label="True"), said[place]) for place in range(5000)]
    )
    assert len(units) == 5000
    drawn = [units[rng.integers(5000, size=5000)] for _ in range(50)]
    assert np.std([*map(metric.combine, drawn)]) < 5
    # A thousand draws take seconds if one takes as long as a few sorts, and not as long as a loop over its answers.
    ratio = cpu_ratio(lambda: [*map(metric.combine, drawn)], lambda: [np.sort(one, axis=0) for one in drawn])
    assert ratio < 10
