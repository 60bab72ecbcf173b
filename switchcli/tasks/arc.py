"""ARC: school questions in science with three to five options each; an answer is the text of the right option.

The paper scores the generated answer and gives no format, and T5 has no such task: this one is ours, in T5's style.
Both sets have the same prefix, so that one can be trained on for the other.
"""

import string
from collections.abc import Iterator

from switchcli.tasks.columns import answers, asked, text, texts
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match


def _examples(row: Row, purpose: Purpose) -> Iterator[Example]:
    """The options are lettered by their place, whether the set calls them A to D or 1 to 4."""
    question, options, names = text(row, "question"), texts(row, "choices.text"), texts(row, "choices.label")
    if len(options) != len(names) or not 2 <= len(options) <= len(string.ascii_lowercase):
        raise ValueError(
            f"choices: has {len(options)} texts and {len(names)} labels, and should have one label a text, two at least"
        )
    key = text(row, "answerKey")
    if key and key not in names:
        raise ValueError(f"answerKey: is {key!r}, and should be one of {', '.join(names)}, or empty if it is secret")
    letters = (f"choice_{letter}: {option}" for letter, option in zip(string.ascii_lowercase, options, strict=False))
    return asked(
        f"arc question: {question} {' '.join(letters)}", answers([options[names.index(key)]] if key else []), purpose
    )


def _task(name: str, config: str) -> Task:
    return Task(
        name=name,
        source=HubSource("allenai/ai2_arc", config, f"ai2_arc/{config}"),
        columns=("question", "choices", "answerKey"),
        examples=_examples,
        metrics=(exact_match,),
        chance=25.0,  # nearly all questions have four options
    )


TASKS: tuple[Task, ...] = (_task("arc_easy", "ARC-Easy"), _task("arc_challenge", "ARC-Challenge"))
