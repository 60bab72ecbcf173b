"""SQuAD 1.1: a question about a paragraph, answered by words of it. The format is T5's; the paper reports exact match.

T5 puts spaces around punctuation in the question, the paragraph and the answers, and scores in that form.
"""

import re
import string
from collections.abc import Iterator

from switchcli.tasks.columns import answers, asked, text, texts
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import squad_em, squad_f1

PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
"""RE2's `[[:punct:]]`, which is ASCII only, as is its `\\s` below."""


def spaced(sentence: str) -> str:
    """Put spaces around each ASCII punctuation mark, then make runs of whitespace one space (T5 since April 2022).

    Spaces at the ends are dropped, as T5's vocabulary does.

    # Deviates: earlier versions of T5, so the paper's too, put spaces around all but ASCII letters, digits and
    # underscores: `Introducción` became `Introducci ó n`.
    """
    apart = re.sub(PUNCTUATION, r" \1 ", sentence)
    return re.sub(r"[ \t\n\f\r]+", " ", apart).strip(" ")


def _examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    question, context = spaced(text(row, "question")), spaced(text(row, "context"))
    targets = answers(spaced(answer) for answer in texts(row, "answers.text"))
    return asked(f"question: {question} context: {context}", targets, purpose)


TASKS: tuple[Task, ...] = (
    Task(
        name="squad",
        source=HubSource("rajpurkar/squad", None, "squad", test=None),
        columns=("question", "context", "answers"),
        examples=_examples,
        metrics=(squad_em,),
        chance=0.0,
        beside=(squad_f1,),
    ),
)
