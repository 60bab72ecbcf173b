"""What families of labelled tasks share: the word of a label, and T5's form of a row, `NAME key: text key: text`.

Texts stay as they are, odd spaces included: T5 changes none of them.
"""

from collections.abc import Iterator, Sequence
from reprlib import repr as short

from switchcli.tasks.columns import asked, text, value
from switchcli.tasks.label_metrics import ACCURACY
from switchcli.tasks.task import Example, HubSource, Metric, Purpose, Row, Task

SECRET = -1
"""The label of a row whose answer the benchmark keeps to itself."""


def label_word(row: Row, labels: Sequence[str]) -> tuple[str, ...]:
    """The word of the row's label; none where it is secret."""
    label = value(row, "label")
    if label == SECRET:
        return ()
    if not isinstance(label, int) or not 0 <= label < len(labels):
        raise ValueError(f"label: {short(label)} is none of 0 to {len(labels) - 1}, or -1 where it is secret")
    return (labels[label],)


def prefixed(prefix: str, row: Row, columns: Sequence[str], keys: Sequence[str]) -> str:
    return " ".join([prefix, *(f"{key}: {text(row, column)}" for key, column in zip(keys, columns, strict=True))])


def referent_example(question: str, referent: str, judgement: tuple[str, ...], purpose: Purpose) -> Iterator[Example]:
    """The one example of a row that proposes a referent and has the judgement on it; none to train on unless `True`."""
    if purpose == "scoring" or judgement == ("True",):
        yield Example(question, (referent,), label=judgement[0]) if judgement else Example(question, ())


def label_task(
    name: str,
    source: HubSource,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[Metric, ...] = (ACCURACY,),
    *,
    prefix: str = "",
    keys: tuple[str, ...] = (),
    chance: float | None = None,
) -> Task:
    """A task whose `label` is one of k words.

    Args:
        prefix: the input's first word, where it is not the task's name.
        keys: what the columns are called in the input, where it is not their name.
        chance: 100 / k unless said otherwise. That is accuracy's; it is F1's too, binary or macro, if the labels are
            equally frequent, and so it is taken for F1 whatever their shares are.
    """

    def examples(row: Row, purpose: Purpose) -> Iterator[Example]:
        return asked(prefixed(prefix or name, row, columns, keys or columns), label_word(row, labels), purpose)

    return Task(
        name,
        source,
        columns=(*columns, "label"),
        examples=examples,
        metrics=metrics,
        chance=100 / len(labels) if chance is None else chance,
        labels=labels,
    )
