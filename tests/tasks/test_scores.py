"""Scores of a task: intervals, what is not labelled or malformed, the baselines; and the means of suites."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchcli.tasks.label_metrics import ACCURACY, PEARSON, f1, macro_f1, matthews
from switchcli.tasks.scores import Score, score
from switchcli.tasks.suites import CLOSED_BOOK_QA, GLUE, MNLI, PAPER, SUITES, SUPER_GLUE
from switchcli.tasks.task import AnsweredExample, Example, HubSource, Metric, Task
from switchcli.tasks.text_metrics import bleu, exact_match, rouge2, squad_em, squad_f1

TASK = Task(
    "t", HubSource("p", None, "f"), (), lambda row, purpose: [], (exact_match,), 50.0, ("yes", "no"), (squad_f1,)
)
LABEL = st.sampled_from(["yes", "no", "", "perhaps"])


def answered(targets: str, predictions: str) -> list[AnsweredExample]:
    """`yn-` and `yn?`: yes, no; a secret answer; a malformed one."""
    words = {"y": ("yes",), "n": ("no",), "-": ()}
    said = {"y": "yes", "n": " no\n", "?": "perhaps"}
    return [AnsweredExample(Example("", words[of]), said[by]) for of, by in zip(targets, predictions, strict=True)]


LABELED = (f1("no", "yes"), macro_f1(("yes", "no")), ACCURACY, matthews(("yes", "no")))


@pytest.mark.parametrize("metrics", [*((metric,) for metric in LABELED), LABELED[2:], LABELED])
def test_the_chance_of_unequal_labels_is_that_of_random_answers(metrics: tuple[Metric, ...]) -> None:
    examples = answered("y" * 8 + "n" * 92, "y" * 100)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        said = [answer._replace(prediction=str(rng.choice(["yes", "no"]))) for answer in examples]
        drawn.append(np.mean([metric.combine(metric.measure(said)) for metric in metrics]))
    chance = score(TASK._replace(metrics=metrics), examples, draws=1).chance
    assert chance == pytest.approx(np.mean(drawn), abs=1.0)


def test_answers_that_are_no_numbers_are_malformed_where_numbers_are_compared() -> None:
    said = [
        AnsweredExample(Example("", (target,)), answer) for target, answer in (("1", "2"), ("3", "nan"), ("4", "x"))
    ]
    found = score(TASK._replace(metrics=(PEARSON,), secondary_metrics=(), labels=()), said, draws=1)
    assert found.malformed == pytest.approx(100 * 2 / 3)


def test_a_task_by_hand() -> None:
    found = score(TASK, answered("yyynn--", "yynn?y?"))
    assert found.score == found.metrics["em"]
    assert found.metrics["em"].value == found.secondary_metrics["f1"].value == pytest.approx(60)
    assert (found.num_examples, found.num_units, found.num_unlabeled) == (5, 5, 2)
    assert found.malformed == pytest.approx(100 * 2 / 7)
    assert (found.chance, found.majority) == (50, pytest.approx(60))
    plain = found.to_json()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["score"] == plain["metrics"]["em"] == found.metrics["em"]._asdict()


def test_the_score_is_the_mean_of_the_metrics_drawn_together() -> None:
    task = TASK._replace(metrics=(squad_em, squad_f1), secondary_metrics=(), labels=())
    said = [
        AnsweredExample(Example("", ("big moose",)), word) for word in ("big moose", "moose", "elk", "a big, big moose")
    ]
    found = score(task, said)
    assert found.metrics["em"].value == 25
    assert found.metrics["f1"].value == pytest.approx(100 * (1 + 2 / 3 + 0 + 0.8) / 4)
    assert found.score is not None
    assert found.score.value == pytest.approx((found.metrics["em"].value + found.metrics["f1"].value) / 2)
    assert found.malformed is None
    assert found.majority == 100
    lows = [metric.low for metric in found.metrics.values()]
    assert min(lows) <= found.score.low <= max(lows)
    found = score(task._replace(metrics=(squad_em,), secondary_metrics=(squad_f1,)), said)
    assert found.score == found.metrics["em"] != found.secondary_metrics["f1"], "a metric beside does not count"


@pytest.mark.parametrize("targets", ["", "-", "---"])
def test_without_labels_there_is_no_score(targets: str) -> None:
    found = score(TASK, answered(targets, "?" * len(targets)))
    assert (found.score, found.metrics, found.secondary_metrics, found.majority) == (None, {}, {}, None)
    assert (found.num_examples, found.num_units, found.num_unlabeled) == (0, 0, len(targets))
    assert found.malformed == (100 if targets else None)
    assert json.loads(json.dumps(found.to_json()))["score"] is None


def test_of_equally_frequent_targets_the_first_is_the_majority() -> None:
    said = [AnsweredExample(Example("", targets), "") for targets in (("b", "a"), ("a",), ("b",), ("a",))]
    assert score(TASK, said).majority == 50
    assert score(TASK, said[1:3]).majority == 50


def test_the_same_seed_draws_the_same_units() -> None:
    said = answered("yynny" * 8, "ynnyy" * 8)
    assert score(TASK, said) == score(TASK, said, seed=0)
    assert score(TASK, said) != score(TASK, said, seed=1)
    assert score(TASK, said, draws=0).score == Score(score(TASK, said).metrics["em"].value, None, None)


def test_the_answers_of_each_label_are_counted() -> None:
    found = score(TASK, answered("yyyyynnn--", "yynn?nyn?y")).labels
    assert found == {"yes": (5, 3, 2, "no"), "no": (3, 4, 2, "yes")}
    several = [AnsweredExample(Example("", ("yes", "no")), said) for said in ("no", "x")]
    assert score(TASK, several).labels == {"yes": (1, 0, 0, "x"), "no": (1, 1, 1, None)}


def test_a_rare_label_does_not_lower_the_interval_of_right_answers() -> None:
    """Resamples without a label have no F1 of it."""
    words = ["yes"] * 60 + ["no"] * 39 + ["rare"]
    said = [AnsweredExample(Example("", (word,)), word) for word in words]
    metrics = (macro_f1(("yes", "no", "rare")),)
    assert score(TASK._replace(metrics=metrics, secondary_metrics=()), said).score == Score(100.0, None, None)


def test_where_all_are_alike_there_is_no_interval() -> None:
    """0 of 20 right does not say that the score is 0 for certain."""
    assert score(TASK, answered("y" * 20, "n" * 20)).score == Score(0.0, None, None)
    one = [AnsweredExample(Example("", ("yes",), "q"), said) for said in ("yes", "no")]
    assert score(TASK, one).score == Score(50.0, None, None)


def test_the_interval_of_a_share_is_about_the_normal_one() -> None:
    found = score(TASK, answered("y" * 400, "y" * 300 + "n" * 100), draws=2000).score
    assert found is not None
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400) * 100
    np.testing.assert_allclose([found.low, found.high], [75 - half, 75 + half], atol=0.5)


def test_answers_of_one_unit_are_drawn_together() -> None:
    """Ten answers to one question say no more than one answer."""
    pairs = [(f"q{number % 10}", "yes" if number % 10 < 7 else "no") for number in range(400)]
    alone = score(TASK, [AnsweredExample(Example("", ("yes",)), said) for _, said in pairs])
    together = score(TASK, [AnsweredExample(Example("", ("yes",), unit), said) for unit, said in pairs])
    assert alone.score is not None
    assert together.score is not None
    assert (alone.num_units, together.num_units) == (400, 10)
    assert alone.score.value == together.score.value == pytest.approx(70)
    assert together.score.high - together.score.low > 3 * (alone.score.high - alone.score.low)


@given(st.lists(st.tuples(LABEL, LABEL), min_size=1, max_size=12))
def test_an_interval_holds_its_score(pairs: list[tuple[str, str]]) -> None:
    said = [AnsweredExample(Example("", (target,)), prediction) for target, prediction in pairs]
    found = score(TASK._replace(metrics=(exact_match, bleu, rouge2)), said, draws=1)
    assert found.score is not None
    for one in (found.score, *found.metrics.values(), *found.secondary_metrics.values()):
        assert 0 <= one.value <= 100 + 1e-9
        if one.low is not None and one.high is not None:
            assert 0 <= one.low <= one.value <= one.high <= 100 + 1e-9


def test_matched_and_mismatched_are_one_task() -> None:
    scores = dict.fromkeys(GLUE.tasks(), 80.0)
    assert len(scores) == 9
    assert "wnli" not in scores
    assert GLUE.mean(scores | {"mnli": 60.0, "mnli_mismatched": 40.0}) == pytest.approx((7 * 80 + 50) / 8)
    assert MNLI.mean({"mnli": 60.0}) is None
    assert GLUE.mean({name: 80.0 for name in GLUE.tasks() if name != "cola"}) is None


def test_the_paper_has_the_columns_of_its_table() -> None:
    scores = {name: float(number) for number, name in enumerate(PAPER.tasks())}
    parts = PAPER.member_scores(scores)
    assert list(parts) == [
        *("glue", "squad", "super_glue", "winogrande", "xsum", "anli_r3", "arc_easy", "arc_challenge"),
        *("web_questions", "natural_questions", "trivia_qa"),
    ]
    assert (parts["glue"], parts["super_glue"]) == (GLUE.mean(scores), SUPER_GLUE.mean(scores))
    assert PAPER.mean(scores) == pytest.approx(np.mean([part for part in parts.values() if part is not None]))
    assert CLOSED_BOOK_QA.mean(dict.fromkeys(CLOSED_BOOK_QA.tasks(), 30.0)) == 30


def test_each_task_is_once_in_a_suite() -> None:
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    for suite in SUITES:
        assert len(set(suite.tasks())) == len(suite.tasks())
        assert not set(suite.trained_too) & set(suite.tasks())
