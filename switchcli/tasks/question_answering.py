"""Question answering in T5's formats: SQuAD, closed-book questions and ARC.

SQuAD 1.1 asks about a paragraph and takes answers from it. T5 puts spaces around punctuation in its questions,
paragraphs and answers, and scores in that form.

Closed-book questions come without a text, so the model answers from what it learned in pre-training. Their splits are
those of T5's closed-book work: the end of the training split validates, and what the hub calls `validation` (for Web
Questions `test`) is only for the final test.

ARC has school questions in science with three to five options, and the answer is the text of the right option. The
Switch paper scores the generated answer without giving a format, and T5 has no such task. The format is ours, in T5's
style. Both sets of ARC share a prefix, so that a model can train on one for the other.
"""

import re
import string
from collections.abc import Iterator

from switchcli.tasks.columns import answers, question_example, text, texts
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match, squad_em, squad_f1, trivia_em, trivia_f1

PUNCTUATION = re.compile(f"([{re.escape(string.punctuation)}])")
"""ASCII punctuation, as RE2's `[[:punct:]]` in T5's code."""


def space_punctuation(sentence: str) -> str:
    """Put spaces around each ASCII punctuation mark and reduce whitespace to single spaces (T5 since April 2022).

    Spaces at the ends are dropped, as T5's vocabulary does.

    # Deviates: earlier versions of T5, so the paper's too, put spaces around all but ASCII letters, digits and
    # underscores: `Introducción` became `Introducci ó n`.
    """
    spaced = re.sub(PUNCTUATION, r" \1 ", sentence)
    # RE2's `\s` is these five characters only; Python's would match other Unicode spaces too.
    return re.sub(r"[ \t\n\f\r]+", " ", spaced).strip(" ")


def _squad(row: Row, purpose: Purpose) -> Iterator[Example]:
    question, context = space_punctuation(text(row, "question")), space_punctuation(text(row, "context"))
    targets = answers(space_punctuation(answer) for answer in texts(row, "answers.text"))
    return question_example(f"question: {question} context: {context}", targets, purpose)


def _natural_questions(row: Row, purpose: Purpose) -> Iterator[Example]:
    return question_example(f"nq question: {text(row, 'question')}", answers(texts(row, "answer")), purpose)


def _web_questions(row: Row, purpose: Purpose) -> Iterator[Example]:
    return question_example(f"wq question: {text(row, 'question')}", answers(texts(row, "answers")), purpose)


def _trivia_qa(row: Row, purpose: Purpose) -> Iterator[Example]:
    """Train on the value, and accept only the aliases in scoring, which nearly always include the value (T5).

    In scoring the value comes first if it is an alias, because the cross-entropy is that of the first target. The hub
    writes a secret value as `<unk>`.
    """
    value, aliases = text(row, "answer.value"), texts(row, "answer.aliases")
    known_value = () if value == "<unk>" else (value,)
    if purpose == "training":
        targets = answers((*known_value, *aliases))
    else:
        # T5 cannot score a row without aliases. Here its value is the right answer.
        targets = answers(sorted(aliases, key=lambda alias: alias != value)) or answers(known_value)
    return question_example(f"trivia_qa question: {text(row, 'question')}", targets, purpose)


def _arc(row: Row, purpose: Purpose) -> Iterator[Example]:
    """Label the options `choice_a`, `choice_b`, ... in order, whether the row calls them A to D or 1 to 4."""
    question, options, names = text(row, "question"), texts(row, "choices.text"), texts(row, "choices.label")
    if len(options) != len(names) or not 2 <= len(options) <= len(string.ascii_lowercase):
        raise ValueError(
            f"choices: has {len(options)} texts and {len(names)} labels, and should have at least two texts, each "
            "with a label"
        )
    key = text(row, "answerKey")
    if key and key not in names:
        raise ValueError(f"answerKey: is {key!r}, and should be one of {', '.join(names)}, or empty if it is secret")
    choices = (f"choice_{letter}: {option}" for letter, option in zip(string.ascii_lowercase, options, strict=False))
    targets = answers([options[names.index(key)]] if key else [])
    return question_example(f"arc question: {question} {' '.join(choices)}", targets, purpose)


def _arc_task(name: str, config: str) -> Task:
    return Task(
        name=name,
        source=HubSource("allenai/ai2_arc", config, f"ai2_arc/{config}"),
        columns=("question", "choices", "answerKey"),
        examples=_arc,
        metrics=(exact_match,),
        chance=25.0,  # nearly all questions have four options
    )


TASKS: tuple[Task, ...] = (
    Task(
        name="squad",
        source=HubSource("rajpurkar/squad", None, "squad", test=None),
        columns=("question", "context", "answers"),
        examples=_squad,
        metrics=(squad_em,),
        chance=0.0,
        secondary_metrics=(squad_f1,),
    ),
    Task(
        name="natural_questions",
        source=HubSource(
            "google-research-datasets/nq_open", None, "nq_open", validation=None, test="validation", num_train=79_168
        ),
        columns=("question", "answer"),
        examples=_natural_questions,
        metrics=(squad_em,),
        chance=0.0,
        secondary_metrics=(squad_f1,),
    ),
    Task(
        name="web_questions",
        source=HubSource("stanfordnlp/web_questions", None, "web_questions", validation=None, num_train=3_417),
        columns=("question", "answers"),
        examples=_web_questions,
        metrics=(squad_em,),
        chance=0.0,
        secondary_metrics=(squad_f1,),
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
        secondary_metrics=(trivia_f1,),
    ),
    _arc_task("arc_easy", "ARC-Easy"),
    _arc_task("arc_challenge", "ARC-Challenge"),
)
