"""Task: where its rows come from, how a row becomes texts, and how answers are scored (T5's text-to-text format).

A task is a value and holds no data. A family of tasks is one file beside this one; `registry` finds them all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchcli.data.prepare.digests import Digests

Row = Mapping[str, Any]
"""One example by the column names that the set has on the Hugging Face hub."""
Purpose = Literal["training", "scoring"]


class Example(NamedTuple):
    """What the model reads, and what it should write."""

    input: str
    targets: tuple[str, ...]
    """Every right answer, the one to train on first; empty where the set keeps it secret."""
    unit: str = ""
    """Examples of one unit are scored together: the answers to one question of MultiRC."""
    label: str = ""
    """What a metric compares with where that is none of the targets (WSC)."""


class AnsweredExample(NamedTuple):
    """An example with what the model wrote."""

    example: Example
    prediction: str


class Metric(NamedTuple):
    """A score of answers, mostly from 0 to 100 as T5 reports it: numbers for each unit, and from them the score.

    So an interval can be had by drawing units again, whatever the metric.
    """

    name: str
    measure: Callable[[Sequence[AnsweredExample]], NDArray[np.float64]]
    """[units, numbers] of labelled answers, one at least; a prediction may be any text."""
    combine: Callable[[NDArray[np.float64]], float]
    """The score of units, each perhaps several times."""
    is_exact: bool = False
    """Each answer by itself is right (100) or wrong (0)."""
    has_even_chance: bool = False
    """Answers drawn at random from k labels score 100 / k, if the labels are equally frequent."""

    def of_labels(self, labels: tuple[str, ...]) -> "Metric":
        """Return the metric itself, since it does not depend on the labels."""
        return self


class LabelMetric(NamedTuple):
    """A metric that is computed from the labels of a task, so it needs some."""

    of_labels: Callable[[tuple[str, ...]], Metric]
    """Return the metric of a task with these labels."""
    needs: int | Literal["two or more"] = "two or more"
    """The number of labels it needs."""

    def accepts(self, num_labels: int) -> bool:
        """Return whether a task with `num_labels` labels may use the metric; 0 means free text."""
        return num_labels >= 2 if isinstance(self.needs, str) else num_labels == self.needs


class HubSource(NamedTuple):
    """Where the rows are: on the hub, or in a folder with `FOLDER/SPLIT.jsonl` and the hub's columns."""

    path: str
    """The name on the hub, such as `nyu-mll/glue`."""
    config: str | None
    folder: str
    """Within a local folder of sets, such as `glue/cola`."""
    train: str | None = "train"
    """The split to train on; None: the task is for evaluation alone."""
    validation: str | None = "validation"
    """None: cut off the end of the training split."""
    test: str | None = "test"
    num_train: int | None = None
    """Where `validation` is None: how many rows are left to train on, of a whole set; nine tenths of a smaller one."""


class FilesSource(NamedTuple):
    """A task of a user's own: JSON Lines, by paths or globs."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    rules: str
    """How its rows become texts, as its recipe says."""

    def paths(self, split: str) -> tuple[str, ...]:
        return self._asdict()[split]


class EmbeddedSource(NamedTuple):
    """Rows that the program makes by itself, with nothing to download: a split to train on, and one to validate on."""

    rows: Callable[[Literal["train", "validation"]], Iterator[Row]]
    fingerprint: Callable[[Digests], str]
    """What the rows depend on: as long as it stays the same, so do they."""


class Task(NamedTuple):
    """One task of the suite."""

    name: str
    source: HubSource | FilesSource | EmbeddedSource
    columns: tuple[str, ...]
    """Those that `examples` reads."""
    examples: Callable[[Row, Purpose], Iterable[Example]]
    """The examples of a row: several, or none, where the benchmark says so. ValueError for a row that breaks its rules;
    the message says what is wrong and what would be right, and begins with the column's name."""
    metrics: tuple[Metric, ...]
    """The task's score is their mean, as the benchmarks have it."""
    chance: float
    """That score for answers drawn at random: uniform over the labels, 0 where answers are free text."""
    labels: tuple[str, ...] = ()
    """All that a right answer can be; empty for free text."""
    beside: tuple[Metric, ...] = ()
    """Reported too, and of no weight in the task's score: F1 beside SQuAD's exact match."""
