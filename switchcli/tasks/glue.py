"""GLUE (Wang et al. 2018) in T5's formats: nine tasks, mismatched MNLI and the diagnostic set.

T5 does not train on WNLI. WNLI is scored in the format of WSC, by a model that was trained on WSC and DPR.
"""

from collections.abc import Iterable
from reprlib import repr as short

import numpy as np

from switchcli.tasks.columns import question_example, text, value
from switchcli.tasks.label_metrics import ACCURACY, PEARSON, REFERENT_ACCURACY, SPEARMAN, f1, matthews
from switchcli.tasks.label_tasks import (
    ENTAILMENT,
    FALSE_TRUE,
    NLI,
    SECRET,
    THREE_WAY,
    label_task,
    label_word,
    prefixed,
    referent_example,
)
from switchcli.tasks.pronouns import resolve
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task

HUB = "nyu-mll/glue"
SENTENCES = ("sentence1", "sentence2")
COLA = ("unacceptable", "acceptable")
MRPC = ("not_equivalent", "equivalent")
QQP = ("not_duplicate", "duplicate")
SCORES = tuple(f"{fifths / 5:.1f}" for fifths in range(26))


def _stsb(row: Row, purpose: Purpose) -> Iterable[Example]:
    """Ask for the similarity of two sentences, from 0.0 to 5.0 in steps of 0.2.

    It is rounded to the nearest fifth in float32, and halves are rounded to the even fifth, as in T5.
    """
    question, label = prefixed("stsb", row, SENTENCES, SENTENCES), value(row, "label")
    targets: tuple[str, ...] = ()
    if label != SECRET:
        if not isinstance(label, int | float) or not 0 <= label <= 5:
            raise ValueError(f"label: is {short(label)}, and should be a number from 0 to 5, or -1 if it is secret")
        targets = (SCORES[round(float(np.float32(label) * np.float32(5)))],)
    return question_example(question, targets, purpose)


def _wnli(row: Row, purpose: Purpose) -> Iterable[Example]:
    """Ask for the referent of the premise's pronoun; the target is the phrase in the hypothesis, right or wrong."""
    judgment = label_word(row, FALSE_TRUE)  # not entailed, entailed
    return referent_example(*resolve(text(row, "sentence1"), text(row, "sentence2")), judgment, purpose)


TASKS: tuple[Task, ...] = (
    label_task("cola", HubSource(HUB, "cola", "glue/cola"), ("sentence",), COLA, (matthews(COLA),)),
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
        chance=50,  # the answer is free, the judgment is one of two
    ),
    # The diagnostic set has only a test split, without labels. GLUE scores it by a correlation.
    label_task(
        "ax",
        HubSource(HUB, "ax", "glue/ax", train=None, validation="test"),
        NLI,
        THREE_WAY,
        (matthews(THREE_WAY),),
        prefix="mnli",
    ),
)
