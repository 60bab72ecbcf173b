"""GLUE (Wang et al. 2018) in T5's formats: nine tasks, mismatched MNLI and the diagnostic set.

T5 does not train on WNLI. It is scored through the format of WSC, by a model that learned WSC and DPR.
"""

from collections.abc import Iterable
from reprlib import repr as short

import numpy as np

from switchcli.tasks.columns import asked, text, value
from switchcli.tasks.label_metrics import ACCURACY, PEARSON, REFERENT_ACCURACY, SPEARMAN, f1, matthews
from switchcli.tasks.labelled_rows import SECRET, label_task, label_word, prefixed, referent_example
from switchcli.tasks.pronoun import resolve
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task

HUB = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")
THREE_WAY = ("entailment", "neutral", "contradiction")
SENTENCES = ("sentence1", "sentence2")
NLI = ("hypothesis", "premise")

COLA = ("unacceptable", "acceptable")
MRPC = ("not_equivalent", "equivalent")
QQP = ("not_duplicate", "duplicate")
SCORES = tuple(f"{fifths / 5:.1f}" for fifths in range(26))


def _stsb(row: Row, purpose: Purpose) -> Iterable[Example]:
    """The score as text, rounded to the nearest fifth: in float32 and halves to the even fifth, as T5 does it."""
    return asked(prefixed("stsb", row, SENTENCES, SENTENCES), _score(value(row, "label")), purpose)


def _score(label: object) -> tuple[str, ...]:
    if label == SECRET:
        return ()
    if not isinstance(label, int | float) or not 0 <= label <= 5:
        raise ValueError(f"label: {short(label)} is no number from 0 to 5, or -1 where it is secret")
    return (SCORES[round(float(np.float32(label) * np.float32(5)))],)


def _wnli(row: Row, purpose: Purpose) -> Iterable[Example]:
    """The premise with its pronoun marked; the phrase that the hypothesis puts there is the target, right or not."""
    not_entailment, entailment = "False", "True"
    judgement = label_word(row, (not_entailment, entailment))
    return referent_example(*resolve(text(row, "sentence1"), text(row, "sentence2")), judgement, purpose)


TASKS: tuple[Task, ...] = (
    label_task("cola", HubSource(HUB, "cola", "glue/cola"), ("sentence",), COLA, (matthews(COLA),), chance=0),
    label_task("sst2", HubSource(HUB, "sst2", "glue/sst2"), ("sentence",), ("negative", "positive")),
    label_task("mrpc", HubSource(HUB, "mrpc", "glue/mrpc"), SENTENCES, MRPC, (f1(*MRPC), ACCURACY)),
    label_task("qqp", HubSource(HUB, "qqp", "glue/qqp"), ("question1", "question2"), QQP, (f1(*QQP), ACCURACY)),
    Task(
        "stsb",
        HubSource(HUB, "stsb", "glue/stsb"),
        columns=(*SENTENCES, "label"),
        examples=_stsb,
        metrics=(PEARSON, SPEARMAN),
        chance=0,
        labels=SCORES,
    ),
    label_task(
        "mnli",
        HubSource(HUB, "mnli", "glue/mnli", validation="validation_matched", test="test_matched"),
        NLI,
        THREE_WAY,
    ),
    label_task(
        "mnli_mismatched",
        HubSource(HUB, "mnli", "glue/mnli", None, "validation_mismatched", "test_mismatched"),
        NLI,
        THREE_WAY,
        prefix="mnli",
    ),
    label_task("qnli", HubSource(HUB, "qnli", "glue/qnli"), ("question", "sentence"), ENTAILMENT),
    label_task("rte", HubSource(HUB, "rte", "glue/rte"), SENTENCES, ENTAILMENT),
    Task(
        "wnli",
        HubSource(HUB, "wnli", "glue/wnli", train=None),
        columns=(*SENTENCES, "label"),
        examples=_wnli,
        metrics=(REFERENT_ACCURACY,),
        chance=50,  # the answer is free, the judgement is one of two
    ),
    # The diagnostic set has a test split alone, without labels; GLUE's score for it is a correlation.
    label_task(
        "ax",
        HubSource(HUB, "ax", "glue/ax", train=None, validation="test"),
        NLI,
        THREE_WAY,
        (matthews(THREE_WAY),),
        prefix="mnli",
        chance=0,
    ),
)
