"""GLUE, SuperGLUE, ANLI and WinoGrande: from a row with the hub's columns to the exact texts."""

import re
from typing import Any, NamedTuple

import pytest

from switchcli.tasks import adversarial, glue, superglue
from switchcli.tasks.task import AnsweredExample, Example, Purpose, Row

TASKS = {task.name: task for family in (glue, superglue, adversarial) for task in family.TASKS}
FREE_TEXT = {"wnli", "record", "wsc", "dpr", "winogrande"}


def made(name: str, row: Row, purpose: Purpose = "scoring") -> list[Example]:
    return list(TASKS[name].examples(row, purpose))


class Case(NamedTuple):
    name: str
    row: dict[str, Any]
    input: str
    target: str


NLI = {"premise": "It  rained .", "hypothesis": "It was <b>wet</b>.", "idx": 3}
CASES = [
    Case("cola", {"sentence": " The box  rolled .", "label": 1}, "cola sentence:  The box  rolled .", "acceptable"),
    Case("sst2", {"sentence": "it 's dull ", "label": 0}, "sst2 sentence: it 's dull ", "negative"),
    Case(
        "mrpc",
        {"sentence1": "A sold B .", "sentence2": "B was sold .", "label": 0, "idx": 0},
        "mrpc sentence1: A sold B . sentence2: B was sold .",
        "not_equivalent",
    ),
    Case(
        "qqp",
        {"question1": "Why?", "question2": "How so?", "label": 1},
        "qqp question1: Why? question2: How so?",
        "duplicate",
    ),
    Case(
        "stsb",
        {"sentence1": "A man runs.", "sentence2": "Someone runs.", "label": 4.25},
        "stsb sentence1: A man runs. sentence2: Someone runs.",
        "4.2",
    ),
    Case("mnli", {**NLI, "label": 2}, "mnli hypothesis: It was <b>wet</b>. premise: It  rained .", "contradiction"),
    Case(
        "mnli_mismatched", {**NLI, "label": 1}, "mnli hypothesis: It was <b>wet</b>. premise: It  rained .", "neutral"
    ),
    Case("ax", {**NLI, "label": 0}, "mnli hypothesis: It was <b>wet</b>. premise: It  rained .", "entailment"),
    Case(
        "qnli",
        {"question": "Who?", "sentence": "Ann did.", "label": 0},
        "qnli question: Who? sentence: Ann did.",
        "entailment",
    ),
    Case(
        "rte",
        {"sentence1": "Ann sings.", "sentence2": "Ann is mute.", "label": 1},
        "rte sentence1: Ann sings. sentence2: Ann is mute.",
        "not_entailment",
    ),
    Case(
        "wnli",
        {"sentence1": "The fish ate the worm. It was tasty.", "sentence2": "The worm was tasty.", "label": 1},
        "wsc: The fish ate the worm. *It* was tasty.",
        "The worm",
    ),
    Case(
        "boolq",
        {"question": "is it so", "passage": "It -- ``So'' it is.", "label": 1},
        "boolq passage: It -- ``So'' it is. question: is it so",
        "True",
    ),
    Case("cb", {**NLI, "label": 2}, "cb hypothesis: It was <b>wet</b>. premise: It  rained .", "neutral"),
    Case(
        "copa",
        {"premise": "It rained.", "choice1": "It got wet.", "choice2": "It got dry.", "question": "effect", "label": 0},
        "copa choice1: It got wet. choice2: It got dry. premise: It rained. question: effect",
        "choice1",
    ),
    Case(
        "multirc",
        {
            "paragraph": "<b>Sent 1: </b>Ann left.<br><b>Sent 2: </b>Bob <i>stayed</i>.<br>",
            "question": "Who <b>left</b>?",
            "answer": "Ann<br>",
            "idx": {"paragraph": 2, "question": 7, "answer": 1},
            "label": 0,
        },
        "multirc question: Who left? answer: Ann  paragraph: Sent 1: Ann left. Sent 2: Bob <i>stayed</i>. ",
        "False",
    ),
    Case(
        "record",
        {
            "passage": 'Ann won.\n@highlight\nBob lost\n@highlight\n"He cried"\n@highlight\nThe end',
            "query": "@placeholder was happy",
            "entities": ["Ann", "Bob"],
            "entity_spans": {"text": ["Ann", "Bob"], "start": [0, 9], "end": [3, 12]},
            "answers": ["Ann", "Bob"],
            "idx": {"passage": 0, "query": 0},
        },
        'record query: @placeholder was happy entities: Ann, Bob passage: Ann won. Bob lost. "He cried" The end',
        "Ann",
    ),
    Case(
        "superglue_rte", {**NLI, "label": 0}, "rte hypothesis: It was <b>wet</b>. premise: It  rained .", "entailment"
    ),
    Case(
        "wic",
        {
            **{"word": "place", "sentence1": "Do you want to come over to my place?", "sentence2": "A place to eat."},
            **{"start1": 31, "end1": 36, "start2": 2, "end2": 7, "idx": 0, "label": 0},
        },
        "wic sentence1: Do you want to come over to my place? sentence2: A place to eat. word: place",
        "False",
    ),
    Case(
        "wsc",
        {
            **{"text": "Mark was close to Mr. Singer 's heels. He heard him calling .", "label": 1, "idx": 0},
            **{"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 7},
        },
        "wsc: Mark was close to Mr. Singer 's heels. *He* heard him calling .",
        "Mark",
    ),
    Case(
        "dpr",
        {"sentence": "Bob paid Al when he lost.", "pronoun": "he", "candidates": ["Bob", "Al"], "label": 0},
        "wsc: Bob paid Al when *he* lost.",
        "Bob",
    ),
    Case(
        "axb",
        {"sentence1": "No cat slept.", "sentence2": "A cat slept.", "label": 1, "idx": 0},
        "rte hypothesis: A cat slept. premise: No cat slept.",
        "not_entailment",
    ),
    Case("axg", {**NLI, "label": 1}, "rte hypothesis: It was <b>wet</b>. premise: It  rained .", "not_entailment"),
    *(
        Case(
            f"anli_r{number}",
            {**NLI, "uid": "x", "reason": "", "label": 1},
            "anli hypothesis: It was <b>wet</b>. premise: It  rained .",
            "neutral",
        )
        for number in (1, 2, 3)
    ),
    Case(
        "winogrande",
        {"sentence": "Ann beat Eve, so _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        "winogrande sentence: Ann beat Eve, so _ won. option1: Ann option2: Eve",
        "Ann",
    ),
]
ROWS = {case.name: case.row for case in CASES}


def test_every_task_has_a_case() -> None:
    assert len(TASKS) == sum(len(family.TASKS) for family in (glue, superglue, adversarial))
    assert ROWS.keys() == TASKS.keys()


@pytest.mark.parametrize("purpose", ["training", "scoring"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_row_becomes_texts(case: Case, purpose: Purpose) -> None:
    example = made(case.name, case.row, purpose)[0]
    assert (example.input, example.targets[0]) == (case.input, case.target)


@pytest.mark.parametrize("name", TASKS)
def test_each_label_has_its_word(name: str) -> None:
    labels = TASKS[name].labels
    assert bool(labels) is (name not in FREE_TEXT)
    if name != "stsb":
        for number, word in enumerate(labels):
            assert made(name, {**ROWS[name], "label": number})[0].targets == (word,)


def secret(name: str) -> Row:
    if name == "record":
        return {**ROWS[name], "answers": []}
    return {**ROWS[name], "answer": ""} if name == "winogrande" else {**ROWS[name], "label": -1}


@pytest.mark.parametrize("name", TASKS)
def test_a_secret_answer_leaves_the_input_and_no_target(name: str) -> None:
    [hidden], [shown] = made(name, secret(name)), made(name, ROWS[name])
    assert hidden == Example(shown.input, (), shown.unit)
    assert not made(name, secret(name), "training")


@pytest.mark.parametrize("name", [name for name in TASKS if name not in {"record", "winogrande", "stsb"}])
def test_a_label_that_is_none_is_told(name: str) -> None:
    for bad in (7, -2, "1", None, 0.5, float("nan"), 10**400, [1], {}):
        with pytest.raises(ValueError, match=r"^label: .*\b0\b.*\b[12]\b.* -1\b"):
            made(name, {**ROWS[name], "label": bad})


WRONG: dict[type, tuple[object, ...]] = {str: (None, 3, ["a"]), list: (None, "a", [None]), dict: (None, 3, {})}
"""Values of other kinds, by the kind that a column has."""


@pytest.mark.parametrize("name", TASKS)
def test_a_column_of_another_kind_is_told_by_its_name(name: str) -> None:
    for column in TASKS[name].columns:
        for bad in WRONG.get(type(ROWS[name][column]), ()):
            with pytest.raises(ValueError, match=rf"^{column}\b"):
                made(name, {**ROWS[name], column: bad})


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_score_100(name: str) -> None:
    task = TASKS[name]
    labels = [0, 2.5, 5] if name == "stsb" else range(len(task.labels))
    rows = [{**ROWS[name], "label": label} for label in labels] or [ROWS[name]]
    examples = [example for row in rows for example in made(name, row)]
    for metric in task.metrics:
        units = metric.measure([AnsweredExample(example, example.targets[0]) for example in examples])
        assert units.dtype == "float64"
        assert metric.combine(units) == pytest.approx(100)
    assert 0 <= task.chance <= 50


def test_chance_is_of_labels_drawn_at_random() -> None:
    assert {name: round(task.chance, 1) for name, task in TASKS.items()} == {
        **dict.fromkeys(["cola", "stsb", "ax", "axb", "record"], 0),
        **dict.fromkeys(["mnli", "mnli_mismatched", "cb", "anli_r1", "anli_r2", "anli_r3"], 33.3),
        **dict.fromkeys(["sst2", "mrpc", "qqp", "qnli", "rte", "wnli", "boolq", "copa"], 50),
        **dict.fromkeys(["superglue_rte", "wic", "wsc", "dpr", "axg", "winogrande"], 50),
        "multirc": 27.9,
    }


def test_sources() -> None:
    splits = {name: task.source[3:6] for name, task in TASKS.items()}
    usual = ("train", "validation", "test")
    assert {name: of for name, of in splits.items() if of != usual} == {
        "mnli": ("train", "validation_matched", "test_matched"),
        "mnli_mismatched": (None, "validation_mismatched", "test_mismatched"),
        "wnli": (None, "validation", "test"),
        **dict.fromkeys(["ax", "axb", "axg"], (None, "test", "test")),
        "dpr": ("train", "test", "test"),
        **{f"anli_r{number}": (f"train_r{number}", f"dev_r{number}", f"test_r{number}") for number in (1, 2, 3)},
    }
    assert TASKS["wsc"].source[:3] == ("aps/super_glue", "wsc.fixed", "super_glue/wsc.fixed")
    assert TASKS["superglue_rte"].source[:3] == ("aps/super_glue", "rte", "super_glue/rte")
    assert TASKS["rte"].source[:3] == ("nyu-mll/glue", "rte", "glue/rte")


# What single tasks do


@pytest.mark.parametrize(
    ("score", "text"),
    [
        *[(0.0, "0.0"), (5.0, "5.0"), (3.4, "3.4"), (3, "3.0"), (1.533, "1.6"), (4.75, "4.8"), (0.09, "0.0")],
        # Halves go to the even fifth; float32 has no 2.3, but its product with 5 is 11.5 there.
        *[(0.5, "0.4"), (1.5, "1.6"), (2.5, "2.4"), (2.3, "2.4"), (0.7, "0.8"), (2.299999952316284, "2.4")],
    ],
)
def test_stsb_rounds_to_the_nearest_fifth(score: float, text: str) -> None:
    assert made("stsb", {**ROWS["stsb"], "label": score})[0].targets == (text,)


@pytest.mark.parametrize("bad", [5.1, -0.5, -2, float("nan"), float("inf"), 10**400, "3.4", None, [1]])
def test_stsb_tells_of_a_score_off_its_scale(bad: object) -> None:
    with pytest.raises(ValueError, match=r"^label: .*\b0\b.*\b5\b.* -1\b"):
        made("stsb", {**ROWS["stsb"], "label": bad})


def test_multirc_answers_of_one_question_are_one_unit() -> None:
    units = [
        made("multirc", {**ROWS["multirc"], "idx": {"paragraph": paragraph, "question": question, "answer": answer}})
        for paragraph, question, answer in [(0, 1, 0), (0, 1, 1), (0, 2, 2), (1, 1, 0)]
    ]
    assert [example.unit for [example] in units] == ["0/1", "0/1", "0/2", "1/1"]


@pytest.mark.parametrize("end", [".", "?", "!", '"', "'"])
def test_record_makes_sentences_of_highlights(end: str) -> None:
    for before, after in ((f"A{end}", f"A{end} B"), (f"A{end} ", f"A{end} . B"), ("A)", "A). B")):
        [example] = made("record", {**ROWS["record"], "passage": f"{before}\n@highlight\nB"})
        assert example.input.endswith(f"passage: {after}")


def test_record_trains_on_each_answer_and_scores_with_all() -> None:
    row = {**ROWS["record"], "answers": ["Ann", "ANN", "Ann"]}
    assert [example.targets for example in made("record", row, "training")] == [("Ann",), ("ANN",)]
    [scored] = made("record", row)
    assert scored.targets == ("Ann", "ANN")
    scores = [
        metric.combine(metric.measure([AnsweredExample(scored, "the ann!")])) for metric in TASKS["record"].metrics
    ]
    assert scores == [100, 100]


def test_wsc_trains_on_right_phrases_and_is_judged_by_all() -> None:
    row = {**ROWS["wsc"], "label": 0}
    assert not made("wsc", row, "training")
    [wrong], [right] = made("wsc", row), made("wsc", ROWS["wsc"])
    assert (wrong.targets, wrong.label, right.label) == (("Mark",), "False", "True")
    [metric] = TASKS["wsc"].metrics
    assert metric.combine(metric.measure([AnsweredExample(wrong, "Mr. Singer"), AnsweredExample(right, "mark")])) == 100
    assert metric.combine(metric.measure([AnsweredExample(wrong, "Mark"), AnsweredExample(right, "Mr. Singer")])) == 0


@pytest.mark.parametrize("bad", [None, "7", 7.0])
def test_wsc_tells_of_an_index_that_is_none(bad: object) -> None:
    with pytest.raises(ValueError, match=f"^span2_index: {re.escape(repr(bad))}"):
        made("wsc", {**ROWS["wsc"], "span2_index": bad})


def test_wnli_is_judged_as_wsc_is() -> None:
    [example] = made("wnli", {**ROWS["wnli"], "sentence2": "The fish was tasty.", "label": 0})
    assert (example.targets, example.label) == (("The fish",), "False")
    assert [example.label for example in made("wnli", ROWS["wnli"])] == ["True"]


def test_dpr_needs_two_candidates() -> None:
    with pytest.raises(ValueError, match=r"^candidates: .*\b3\b.*\b2\b"):
        made("dpr", {**ROWS["dpr"], "candidates": ["a", "b", "c"]})


def test_winogrande_answers_with_the_text_of_the_option() -> None:
    assert made("winogrande", {**ROWS["winogrande"], "answer": "2"})[0].targets == ("Eve",)


@pytest.mark.parametrize("bad", ["3", "Ann", 1, None, -1, [1]])
def test_winogrande_tells_of_an_answer_that_is_none(bad: object) -> None:
    with pytest.raises(ValueError, match=rf"^answer: is {re.escape(repr(bad))}.*'1'.*'2'.*''"):
        made("winogrande", {**ROWS["winogrande"], "answer": bad})
