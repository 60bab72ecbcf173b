"""Answers that say nothing: each task and metric scores them as T5 does, which is 0 but for the exceptions listed here.

Expected values were worked out by hand from T5's code (t5/data/postprocessors.py, t5/evaluation/metrics.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import test_labelled_tasks
import test_text_formats

from switchcli.tasks.config import CustomTask
from switchcli.tasks.registry import METRICS, TASKS
from switchcli.tasks.scores import score
from switchcli.tasks.task import AnsweredExample, Example, Task

EMPTY = ("", " ", "the", ".")
ROWS: dict[str, Mapping[str, Any]] = {
    **test_labelled_tasks.ROWS,
    **{name: row for name, row, *_ in test_text_formats.ROWS},
}


def scored(task: Task, examples: list[Example], prediction: str) -> dict[str, float]:
    """Return every metric of a task whose answers are all the same."""
    found = score(task, [AnsweredExample(example, prediction) for example in examples], draws=0)
    return {name: metric.value for name, metric in (found.metrics | found.secondary_metrics).items()}


def labelled_examples(task: Task) -> list[Example]:
    """Return one example of each label, or one of a task of free text."""
    row = ROWS[task.name]
    labels: list[float] = [0, 1] if task.name in {"wsc", "wnli", "dpr"} else list(range(len(task.labels)))
    if task.name == "stsb":
        labels = [0.0, 2.4, 5.0]
    if task.name == "python_modules" or not labels:
        return list(task.examples(row, "scoring"))
    return [example for label in labels for example in task.examples({**row, "label": label}, "scoring")]


# Every task


def exceptions() -> Iterator[tuple[str, str, dict[str, float]]]:
    """Tasks where one of EMPTY scores in T5 too: name, answer, and the metrics that are not 0."""
    for name in ("wsc", "wnli"):
        # `.` is no determiner. It is a word, which does not name the referent: right where the label is False.
        yield name, ".", {"accuracy": 50}
    # ROUGE counts words, and `the` is one of the five words of the summary.
    yield "python_docstrings", "the", {"rouge1": 100 / 3, "rouge_lsum": 100 / 3}


EXCEPTIONS = {(name, answer): metrics for name, answer, metrics in exceptions()}


@pytest.mark.parametrize("prediction", EMPTY)
@pytest.mark.parametrize("name", TASKS)
def test_an_answer_that_says_nothing_scores_what_t5_gives(name: str, prediction: str) -> None:
    """T5 gives no number for the correlations of a constant, and we give 0."""
    found = scored(TASKS[name], labelled_examples(TASKS[name]), prediction)
    assert found == pytest.approx(dict.fromkeys(found, 0.0) | EXCEPTIONS.get((name, prediction), {}), abs=1e-9)


@pytest.mark.parametrize("name", ["squad", "record", "natural_questions", "web_questions", "trivia_qa"])
@pytest.mark.parametrize("answer", ["The", "a", "..."])
def test_an_answer_of_articles_and_punctuation_is_matched_by_an_empty_one_as_in_t5(name: str, answer: str) -> None:
    """SQuAD's and TriviaQA's normalization leave nothing of both. F1 is 0, since they share no word."""
    [example] = TASKS[name].examples(ROWS[name], "scoring")
    for prediction in EMPTY:
        assert scored(TASKS[name], [example._replace(targets=(answer,))], prediction) == {"em": 100, "f1": 0}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("squad", {"answers": {"text": ["", " "]}}),
        ("natural_questions", {"answer": [" "]}),
        ("web_questions", {"answers": [""]}),
        ("trivia_qa", {"answer": {"value": " ", "aliases": [""]}}),
        ("record", {"answers": [" "]}),
        ("dpr", {"candidates": [" ", "Al"], "label": 0}),
        ("winogrande", {"option1": "", "answer": "1"}),
        ("arc_easy", {"choices": {"text": [" ", "x"], "label": ["A", "B"]}, "answerKey": "A"}),
        ("xsum", {"summary": " "}),
        ("cnn_dailymail", {"highlights": ""}),
        ("wmt14_en_fr", {"translation": {"en": "It is.", "fr": " "}}),
        ("python_docstrings", {"summary": " "}),
    ],
)
def test_a_blank_is_no_right_answer(name: str, row: Mapping[str, Any]) -> None:
    """A row without a right answer counts as unlabeled, so an empty answer cannot match it."""
    [example] = TASKS[name].examples({**ROWS[name], **row}, "scoring")
    assert example.targets == ()


# A user's own tasks


@pytest.mark.parametrize("prediction", EMPTY)
@pytest.mark.parametrize("metric", METRICS)
def test_in_a_task_of_ones_own_an_answer_that_says_nothing_scores_0_by_any_metric(metric: str, prediction: str) -> None:
    numbers = metric in {"pearson", "spearman"}
    labels = () if numbers else ("no", "yes", "maybe")[: 2 if metric == "f1" else 3]
    own = CustomTask(name="mine", input="{text}", target="label", labels=labels, metrics=(metric,))
    [task] = own.tasks()
    targets = ("0.5", "1.5", "3.0") if numbers else labels
    examples = [example for label in targets for example in task.examples({"text": "x", "label": label}, "scoring")]
    assert scored(task, examples, prediction) == {metric: 0}


def test_in_a_task_of_ones_own_an_empty_target_is_matched_by_an_empty_answer() -> None:
    """The exception: a row of the user's own may say that writing nothing is right."""
    [task] = CustomTask(name="mine", input="{text}", target="answer").tasks()
    [example] = task.examples({"text": "x", "answer": ""}, "scoring")
    assert scored(task, [example], " ") == {"exact_match": 100}
    assert scored(task, [example], "x") == {"exact_match": 0}
