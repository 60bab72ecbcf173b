"""Building blocks for tasks whose answer is a label, in T5's format `NAME key: text key: text`.

Texts keep unusual spaces, because T5 does not change them either.
"""

from collections.abc import Iterator, Sequence
from reprlib import repr as short

from switchcli.tasks.columns import question_example, text, value
from switchcli.tasks.label_metrics import ACCURACY
from switchcli.tasks.task import Example, HubSource, Metric, Purpose, Row, Task, chance_of

NLI = ("hypothesis", "premise")
"""The columns of most data sets of natural language inference."""
ENTAILMENT = ("entailment", "not_entailment")
FALSE_TRUE = ("False", "True")
THREE_WAY = ("entailment", "neutral", "contradiction")
SECRET = -1
"""The label of a row whose answer the benchmark keeps secret."""


def label_word(row: Row, labels: Sequence[str]) -> tuple[str, ...]:
    """Return the row's label as a word, or () if it is secret. Raises ValueError for a label that does not exist."""
    label = value(row, "label")
    if label == SECRET:
        return ()
    if not isinstance(label, int) or not 0 <= label < len(labels):
        raise ValueError(
            f"label: is {short(label)}, and should be one of 0 to {len(labels) - 1}, or -1 if it is secret"
        )
    return (labels[label],)


def prefixed(prefix: str, row: Row, columns: Sequence[str], keys: Sequence[str]) -> str:
    """Return the prefix followed by `key: text` for each column."""
    return " ".join([prefix, *(f"{key}: {text(row, column)}" for key, column in zip(keys, columns, strict=True))])


def referent_example(question: str, referent: str, judgment: tuple[str, ...], purpose: Purpose) -> Iterator[Example]:
    """Yield the only example of a row that proposes a referent, or none to train on unless the referent is right.

    Args:
        judgment: ("True",) or ("False",), or () if it is secret.
    """
    if purpose == "scoring" or judgment == ("True",):
        yield Example(question, (referent,), label=judgment[0]) if judgment else Example(question, ())


def label_task(
    name: str,
    source: HubSource,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[Metric, ...] = (ACCURACY,),
    *,
    prefix: str = "",
    keys: tuple[str, ...] = (),
) -> Task:
    """Return a task whose column `label` is the index of one of k words.

    Args:
        prefix: the input's first word; the task's name by default.
        keys: the names of the columns in the input; the columns' own names by default.
    """

    def examples(row: Row, purpose: Purpose) -> Iterator[Example]:
        return question_example(
            prefixed(prefix or name, row, columns, keys or columns), label_word(row, labels), purpose
        )

    return Task(
        name,
        source,
        columns=(*columns, "label"),
        examples=examples,
        metrics=metrics,
        chance=chance_of(metrics, len(labels)),
        labels=labels,
    )
