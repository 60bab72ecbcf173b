"""Closed-book questions: answered from what the model has learnt, with no text beside the question (T5's formats).

The splits are those of T5's closed-book work: the end of the training split validates, and what the hub calls
`validation` (of Web Questions `test`) is for the last test alone.
"""

from collections.abc import Iterator

from switchcli.tasks.columns import answers, asked, text, texts
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import squad_em, squad_f1, trivia_em, trivia_f1


def _natural_questions(row: Row, purpose: Purpose) -> Iterator[Example]:
    return asked(f"nq question: {text(row, 'question')}", answers(texts(row, "answer")), purpose)


def _web_questions(row: Row, purpose: Purpose) -> Iterator[Example]:
    return asked(f"wq question: {text(row, 'question')}", answers(texts(row, "answers")), purpose)


def _trivia_qa(row: Row, purpose: Purpose) -> Iterator[Example]:
    """Train on the value; accept the aliases alone when scoring, which nearly always include the value (T5).

    The value comes first if it is an alias, since the first target is the one whose cross-entropy is measured. The hub
    writes a secret value as `<unk>`.
    """
    value, aliases = text(row, "answer.value"), texts(row, "answer.aliases")
    known = () if value == "<unk>" else (value,)
    if purpose == "training":
        targets = answers((*known, *aliases))
    else:
        # T5 cannot score a row without aliases; here its value is the right answer.
        targets = answers(sorted(aliases, key=lambda alias: alias != value)) or answers(known)
    return asked(f"trivia_qa question: {text(row, 'question')}", targets, purpose)


TASKS: tuple[Task, ...] = (
    Task(
        name="natural_questions",
        source=HubSource(
            "google-research-datasets/nq_open", None, "nq_open", validation=None, test="validation", num_train=79_168
        ),
        columns=("question", "answer"),
        examples=_natural_questions,
        metrics=(squad_em,),
        chance=0.0,
        beside=(squad_f1,),
    ),
    Task(
        name="web_questions",
        source=HubSource("stanfordnlp/web_questions", None, "web_questions", validation=None, num_train=3_417),
        columns=("question", "answers"),
        examples=_web_questions,
        metrics=(squad_em,),
        chance=0.0,
        beside=(squad_f1,),
    ),
    Task(
        name="trivia_qa",
        source=HubSource(
            *("mandarjoshi/trivia_qa", "unfiltered.nocontext", "trivia_qa/unfiltered.nocontext"),
            validation=None,
            test="validation",
            num_train=78_785,
        ),
        columns=("question", "answer"),
        examples=_trivia_qa,
        metrics=(trivia_em,),
        chance=0.0,
        beside=(trivia_f1,),
    ),
)
