"""SuperGLUE (Wang et al. 2019) in T5's formats, its diagnostic sets, and Definite Pronoun Resolution, which T5 adds.

SuperGLUE's RTE is `superglue_rte`. It has the sentences of GLUE's RTE under different keys.
"""

import re
from collections.abc import Iterable
from reprlib import repr as short

from switchcli.tasks.columns import answers, question_example, text, texts, value
from switchcli.tasks.label_metrics import ACCURACY, EXACT_MATCH_BY_UNIT, REFERENT_ACCURACY, f1, macro_f1, matthews
from switchcli.tasks.label_tasks import ENTAILMENT, FALSE_TRUE, NLI, label_task, label_word, prefixed, referent_example
from switchcli.tasks.pronouns import mark_first, mark_word
from switchcli.tasks.task import Example, HubSource, Purpose, Row, Task
from switchcli.tasks.text_metrics import exact_match, squad_em, squad_f1

HUB = "aps/super_glue"
CB = ("entailment", "contradiction", "neutral")
COPA = ("choice1", "choice2", "premise", "question")
MULTIRC = ("question", "answer", "paragraph")


def _multirc(row: Row, purpose: Purpose) -> Iterable[Example]:
    """Ask whether an answer to a question is right. The question is the unit; <br>, <b> and </b> are removed."""
    question = re.sub("</?b>", "", prefixed("multirc", row, MULTIRC, MULTIRC).replace("<br>", " "))
    unit = f"{value(row, 'idx.paragraph')}/{value(row, 'idx.question')}"
    return (example._replace(unit=unit) for example in question_example(question, label_word(row, FALSE_TRUE), purpose))


def _record(row: Row, purpose: Purpose) -> Iterable[Example]:
    """Ask which entity the @placeholder of a query stands for.

    To train on, each right answer is an example; in scoring, all of them are the targets of one example. The passage
    ends with highlights of the news article, one after each line `@highlight`. These lines are removed, and a sentence
    before them that has no final punctuation gets a full stop.
    """
    passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", text(row, "passage")).replace("\n@highlight\n", ". ")
    entities = ", ".join(texts(row, "entities"))
    question = f"record query: {text(row, 'query')} entities: {entities} passage: {passage}"
    targets = answers(texts(row, "answers"))
    if purpose == "training":
        return [Example(question, (target,)) for target in targets]
    return [Example(question, targets)]


def _wsc(row: Row, purpose: Purpose) -> Iterable[Example]:
    """Ask for the referent of a pronoun. The target is the proposed phrase, and the label says whether it is right.

    Only right proposals are trained on. The model's answer is free text, and its judgment is whether it names the
    proposed phrase.
    """
    index = value(row, "span2_index")
    if not isinstance(index, int):
        raise ValueError(f"span2_index: {short(index)} is not the index of a word")
    question = mark_word(text(row, "text"), index, text(row, "span2_text"))
    return referent_example(question, text(row, "span1_text"), label_word(row, FALSE_TRUE), purpose)


def _dpr(row: Row, purpose: Purpose) -> Iterable[Example]:
    """Ask for the referent of a pronoun. The target is the right one of two phrases."""
    candidates = texts(row, "candidates")
    if len(candidates) != 2:
        raise ValueError(f"candidates: has {len(candidates)} texts, and should have 2")
    targets = answers(label_word(row, candidates))
    return question_example(mark_first(text(row, "sentence"), text(row, "pronoun")), targets, purpose)


def _source(config: str) -> HubSource:
    return HubSource(HUB, config, f"super_glue/{config}")


def _diagnostic(config: str) -> HubSource:
    """Return a diagnostic set, whose only split `test` is used for validation too, so that its labels can be scored."""
    return HubSource(HUB, config, f"super_glue/{config}", train=None, validation="test")


TASKS: tuple[Task, ...] = (
    label_task("boolq", _source("boolq"), ("passage", "question"), FALSE_TRUE),
    label_task("cb", _source("cb"), NLI, CB, (macro_f1(CB), ACCURACY)),
    label_task("copa", _source("copa"), COPA, ("choice1", "choice2")),
    Task(
        "multirc",
        _source("multirc"),
        columns=(*MULTIRC, "idx", "label"),
        examples=_multirc,
        metrics=(f1(*FALSE_TRUE, name="f1a"), EXACT_MATCH_BY_UNIT),
        # Random answers get all answers right for 5.8 % of the questions of the validation set. F1 as in `label_task`.
        chance=(50 + 5.8) / 2,
        labels=FALSE_TRUE,
    ),
    Task(
        "record",
        _source("record"),
        columns=("passage", "query", "entities", "answers"),
        examples=_record,
        metrics=(squad_em, squad_f1),
        chance=0,
    ),
    label_task("superglue_rte", _source("rte"), NLI, ENTAILMENT, prefix="rte"),
    label_task("wic", _source("wic"), ("sentence1", "sentence2", "word"), FALSE_TRUE),
    Task(
        "wsc",
        _source("wsc.fixed"),
        columns=("text", "span1_text", "span2_index", "span2_text", "label"),
        examples=_wsc,
        metrics=(REFERENT_ACCURACY,),
        chance=50,  # the answer is free, the judgment is one of two
    ),
    # Trained on with WSC, which has only 259 right phrases. It does not count in the benchmark's score.
    Task(
        "dpr",
        HubSource(
            "community-datasets/definite_pronoun_resolution", None, "definite_pronoun_resolution", validation="test"
        ),
        columns=("sentence", "pronoun", "candidates", "label"),
        examples=_dpr,
        metrics=(exact_match,),
        chance=50,  # the sentence has two candidates
    ),
    label_task(
        "axb",
        _diagnostic("axb"),
        ("sentence2", "sentence1"),
        ENTAILMENT,
        (matthews(ENTAILMENT),),
        prefix="rte",
        keys=NLI,
    ),
    label_task("axg", _diagnostic("axg"), NLI, ENTAILMENT, prefix="rte"),
)
