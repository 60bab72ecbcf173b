"""SQuAD 1.1: a question about a paragraph, answered by words of it. The format is T5's; the paper reports exact match.

T5 puts spaces around punctuation in the question, the paragraph and the answers, and scores in that form.
"""

import re
from collections.abc import Iterator

from switchcli.tasks.columns import answers, asked, text, texts
from switchcli.tasks.task import Example, Purpose, Row, Source, Task
from switchcli.tasks.text_metrics import squad_em, squad_f1


def spaced(sentence: str) -> str:
    """Spaces around what is no ASCII letter, digit or underscore (`é` too: T5 has RE2's `\\W`), then single spaces.

    The spaces that this leaves at the ends are taken off, as T5's vocabulary does.
    """
    apart = re.sub(r"([^0-9A-Za-z_])", r" \1 ", sentence)
    return re.sub(r"[ \t\n\f\r]+", " ", apart).strip(" ")


def _examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    question, context = spaced(text(row, "question")), spaced(text(row, "context"))
    targets = answers(spaced(answer) for answer in texts(row, "answers.text"))
    return asked(f"question: {question} context: {context}", targets, purpose)


TASKS: tuple[Task, ...] = (
    Task(
        name="squad",
        source=Source("rajpurkar/squad", None, "squad", test=None),
        columns=("question", "context", "answers"),
        examples=_examples,
        metrics=(squad_em,),
        chance=0.0,
        beside=(squad_f1,),
    ),
)
