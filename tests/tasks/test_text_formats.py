"""Every task of free text: the exact texts of a row with the hub's columns, and what a bad row is told."""

from collections.abc import Mapping
from typing import Any

import pytest

from switchcli.tasks import question_answering, stdlib_tasks, summarization_translation
from switchcli.tasks.question_answering import space_punctuation
from switchcli.tasks.suites import CLOSED_BOOK_QA
from switchcli.tasks.task import Example, HubSource, Task

FAMILIES = (question_answering, summarization_translation, stdlib_tasks)
TASKS: dict[str, Task] = {task.name: task for family in FAMILIES for task in family.TASKS}

QUESTION = {"question": "Who wrote  «Emma»?", "id": "1"}
CHOICES = {"text": ["dry palms", "wet palms", "CO2"], "label": ["A", "B", "C"]}
TRIVIA = {"value": "Jane Austen", "aliases": ["J. Austen", "Jane Austen"], "type": "WikipediaEntity"}
PAIR = {"en": "It is  <b>good</b>.", "de": "Es ist gut.", "fr": "C'est bon.", "ro": "E bine."}

ROWS: list[tuple[str, Mapping[str, Any], str, tuple[str, ...]]] = [
    (
        "squad",
        {
            "id": "1",
            "title": "Warsaw",
            "context": "\tNearby, in Ogród Saski (the Saxon\u00a0Garden), 1870\u20131939.\n",
            "question": "Where's  it?",
            "answers": {"text": ["Ogród Saski", " Ogród  Saski", "the Saxon Garden), "], "answer_start": [11, 11, 24]},
        },
        "question: Where ' s it ? context: Nearby , in Ogród Saski ( the Saxon\u00a0Garden ) , 1870\u20131939 .",
        ("Ogród Saski", "the Saxon Garden ) ,"),
    ),
    (
        "natural_questions",
        {"question": "who wrote emma", "answer": ["Jane Austen", "Austen", "Jane Austen"]},
        "nq question: who wrote emma",
        ("Jane Austen", "Austen"),
    ),
    (
        "web_questions",
        {"url": "x", "question": "who wrote emma?", "answers": ["Jane Austen"]},
        "wq question: who wrote emma?",
        ("Jane Austen",),
    ),
    (
        "trivia_qa",
        {**QUESTION, "answer": TRIVIA},
        "trivia_qa question: Who wrote  «Emma»?",
        ("Jane Austen", "J. Austen"),
    ),
    (
        "arc_easy",
        {"id": "1", "question": "Which heats most?", "choices": CHOICES, "answerKey": "A"},
        "arc question: Which heats most? choice_a: dry palms choice_b: wet palms choice_c: CO2",
        ("dry palms",),
    ),
    (
        "arc_challenge",
        {"question": "Which?", "choices": {**CHOICES, "label": ["1", "2", "3"]}, "answerKey": "3"},
        "arc question: Which? choice_a: dry palms choice_b: wet palms choice_c: CO2",
        ("CO2",),
    ),
    (
        "cnn_dailymail",
        {"article": "By .\nA. Press . It rains .", "highlights": "It rains .\nIt pours .", "id": "1"},
        "summarize: By .\nA. Press . It rains .",
        ("It rains .\nIt pours .",),
    ),
    ("xsum", {"document": "It <i>rains</i>.", "summary": "Rain."}, "summarize: It <i>rains</i>.", ("Rain.",)),
    (
        "wmt14_en_de",
        {"translation": PAIR},
        "translate English to German: It is  <b>good</b>.",
        ("Es ist gut.",),
    ),
    ("wmt14_en_fr", {"translation": PAIR}, "translate English to French: It is  <b>good</b>.", ("C'est bon.",)),
    ("wmt16_en_ro", {"translation": PAIR}, "translate English to Romanian: It is  <b>good</b>.", ("E bine.",)),
    (
        "python_modules",
        {"module": "email", "docstring": "Parse an EmailMessage\nas the email module does, not http's."},
        "python_modules docstring: Parse an _Message\nas the _ module does, not _'s.",
        ("email",),
    ),
    (
        "python_docstrings",
        {"source": "def f(x):\n    return -x", "summary": "Return the negative of x."},
        "python_docstrings source: def f(x):\n    return -x",
        ("Return the negative of x.",),
    ),
]


def test_no_task_is_left_out() -> None:
    assert [name for name, *_ in ROWS] == list(TASKS)


@pytest.mark.parametrize(("name", "row", "text", "targets"), ROWS, ids=[name for name, *_ in ROWS])
def test_a_row_becomes_these_texts(name: str, row: Mapping[str, Any], text: str, targets: tuple[str, ...]) -> None:
    task = TASKS[name]
    assert set(task.columns) <= set(row)
    only = {column: row[column] for column in task.columns}
    for purpose in ("training", "scoring"):
        assert list(task.examples(only, purpose)) == [Example(text, targets)]


SECRET: list[tuple[str, Mapping[str, Any]]] = [
    ("squad", {"question": "Who?", "context": "A.", "answers": {"text": [], "answer_start": []}}),
    ("natural_questions", {"question": "who", "answer": []}),
    ("web_questions", {"question": "who", "answers": [" "]}),
    ("trivia_qa", {"question": "Who?", "answer": {"value": "<unk>", "aliases": []}}),
    ("trivia_qa", {"question": "Who?", "answer": {"value": "", "aliases": []}}),
    ("arc_easy", {"question": "Which?", "choices": CHOICES, "answerKey": ""}),
    ("xsum", {"document": "It rains.", "summary": ""}),
]


@pytest.mark.parametrize(("name", "row"), SECRET)
def test_a_secret_answer_is_not_trained_on_and_has_no_target(name: str, row: Mapping[str, Any]) -> None:
    assert list(TASKS[name].examples(row, "training")) == []
    [example] = TASKS[name].examples(row, "scoring")
    assert example.targets == ()


BAD: list[tuple[str, Mapping[str, Any], str]] = [
    ("squad", {"question": "Who?", "context": "A."}, r"answers\.text: .*\bquestion, context\b"),
    ("squad", {"question": "Who?", "context": "A.", "answers": ["a"]}, r"answers\.text: .*\banswers\b.*\blist\b"),
    ("squad", {"question": None, "context": "A."}, r"question: .*\bnull\b.*\btext\b"),
    ("natural_questions", {"question": "who", "answer": "Austen"}, r"answer: .*\bstr\b.*\blist\b"),
    ("web_questions", {"question": 3, "answers": []}, r"question: .*\bint\b.*\btext\b"),
    ("trivia_qa", {"question": "Who?", "answer": {"aliases": []}}, r"answer\.value: .*\baliases\b"),
    ("arc_easy", {"question": "Which?", "choices": CHOICES, "answerKey": "D"}, r"answerKey: .*'D'.*\bA, B, C\b"),
    (
        "arc_easy",
        {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"},
        r"choices: .*\b2\b.*\b1\b.*\blabel",
    ),
    ("cnn_dailymail", {"article": ["a"], "highlights": "b"}, r"article: .*\blist\b.*\btext\b"),
    ("wmt14_en_de", {"translation": {"en": "a"}}, r"translation\.de: .*\ben\b"),
    ("python_modules", {"module": "tkinter", "docstring": "x"}, r"module: .*'tkinter'.*\basyncio\b"),
]


@pytest.mark.parametrize(("name", "row", "pattern"), BAD)
def test_a_bad_row_says_what_is_wrong(name: str, row: Mapping[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=f"^{pattern}"):
        list(TASKS[name].examples(row, "scoring"))


@pytest.mark.parametrize(
    ("text", "apart"),
    [
        *[("", ""), ("a_b 1", "a _ b 1"), ("U.S.", "U . S ."), ("...", ". . ."), (" \r\n\fx\v", "x\v")],
        *[("été «1»", "été «1»"), ("日本。", "日本。"), ("a\u2019s \u2013 b\u00a0c", "a\u2019s \u2013 b\u00a0c")],
        # T5's own cases
        (
            '"This  is a string with "punctuation (1845-1986) ".',
            '" This is a string with " punctuation ( 1845 - 1986 ) " .',
        ),
        ('"Introducción (la vídeo)".', '" Introducción ( la vídeo ) " .'),
    ],
)
def test_punctuation_stands_apart(text: str, apart: str) -> None:
    assert space_punctuation(text) == apart


def test_each_ascii_punctuation_mark_stands_apart_and_no_other_character() -> None:
    for code in range(33, 0x3000):
        character = chr(code)
        apart = code < 127 and not character.isalnum()
        assert (space_punctuation(f"a{character}b") == f"a {character} b") is apart, character


@pytest.mark.parametrize(
    ("value", "aliases", "trained", "right"),
    [
        ("Austen", ["J. Austen", "Austen"], "Austen", ("Austen", "J. Austen")),
        ("Jane", ["J. Austen", "Austen"], "Jane", ("J. Austen", "Austen")),
        ("<unk>", ["J. Austen"], "J. Austen", ("J. Austen",)),
        ("Austen", [], "Austen", ("Austen",)),
    ],
)
def test_trivia_qa_trains_on_the_value_and_accepts_the_aliases(
    value: str, aliases: list[str], trained: str, right: tuple[str, ...]
) -> None:
    row = {**QUESTION, "answer": {"value": value, "aliases": aliases}}
    [example] = TASKS["trivia_qa"].examples(row, "training")
    assert example.targets[0] == trained
    [example] = TASKS["trivia_qa"].examples(row, "scoring")
    assert example.targets == right


def test_closed_book_sets_validate_on_the_end_of_their_training_split() -> None:
    left = {name: TASKS[name].source for name in CLOSED_BOOK_QA.tasks()}
    sizes = {"natural_questions": 79_168, "web_questions": 3_417, "trivia_qa": 78_785}
    tests = {"natural_questions": "validation", "web_questions": "test", "trivia_qa": "validation"}
    for name, source in left.items():
        assert isinstance(source, HubSource)
        assert (source.train, source.validation, source.test) == ("train", None, tests[name])
        assert source.num_train == sizes[name]


def test_the_paper_reports_these_metrics() -> None:
    reported = {name: [metric.name for metric in task.metrics] for name, task in TASKS.items()}
    assert reported["squad"] == reported["trivia_qa"] == reported["arc_easy"] == ["em"]
    assert reported["xsum"] == reported["cnn_dailymail"] == ["rouge2"]
    assert reported["wmt16_en_ro"] == ["bleu"]
