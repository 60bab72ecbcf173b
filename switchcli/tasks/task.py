"""Tasks in T5's text-to-text format: where rows come from, how a row becomes texts, and how answers are scored.

A Task is a value that holds no data. A family of tasks is one file of this package, which `registry` finds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]
"""One row of a data set, by the column names of the Hugging Face hub."""
Purpose = Literal["training", "scoring"]


class Example(NamedTuple):
    """An input text with its right answers."""

    input: str
    targets: tuple[str, ...]
    """All right answers, the one to train on first; empty if the benchmark keeps the answer secret."""
    unit: str = ""
    """Examples of one unit are scored together, such as the answers to one question of MultiRC."""
    label: str = ""
    """What the metric compares with, if that is not a target (WSC, WNLI)."""


def indices_by_unit(examples: Iterable[Example]) -> list[list[int]]:
    """Return the indices of the examples of each unit, with units in order of their first example."""
    units: dict[str | int, list[int]] = {}
    for index, example in enumerate(examples):
        units.setdefault(example.unit or index, []).append(index)
    return list(units.values())


class AnsweredExample(NamedTuple):
    """An example and the text that the model generated for it."""

    example: Example
    prediction: str


def uniform_chance(num_labels: int) -> float:
    """Return the expected percentage of right answers if they are drawn uniformly from the labels."""
    return 100 / num_labels


class Metric(NamedTuple):
    """A score of answers, as T5 reports it: an array of numbers per unit, and a function from the array to the score.

    The bootstrap of `scores` resamples rows of the array, so it works for every metric. Scores lie between 0 and 100,
    correlations between -100 and 100.
    """

    name: str
    measure: Callable[[Sequence[AnsweredExample]], NDArray[np.float64]]
    """Return [units, numbers] of one or more labeled answers. A prediction may be any text."""
    combine: Callable[[NDArray[np.float64]], float]
    """Return the score of [units, numbers], in which a unit may occur several times."""
    is_exact: bool = False
    """Whether each answer alone is either right (100) or wrong (0)."""
    even_chance: Callable[[int], float] | None = None
    """Return the score of answers drawn uniformly from k labels that are equally frequent. For labels of other
    frequencies, `combine` of the mean numbers of such answers is their score. None: there is no such rule."""
    needs_numbers: bool = False
    """Whether it reads targets and answers as numbers."""
    import_packages: Callable[[], object] = lambda: None
    """Raise ImportError if the metric needs the extra `tasks` and it is not installed."""

    def of_labels(self, labels: tuple[str, ...]) -> "Metric":
        """Return the metric itself, since it does not depend on the labels."""
        return self


def chance_of(metrics: Sequence[Metric], num_labels: int) -> float:
    """Return the mean score of answers drawn uniformly from equally frequent labels; 0 where a metric has no rule."""
    scores = [metric.even_chance(num_labels) if num_labels and metric.even_chance else 0.0 for metric in metrics]
    return sum(scores) / len(scores)


class LabelMetric(NamedTuple):
    """A metric that is computed from the labels of a task."""

    of_labels: Callable[[tuple[str, ...]], Metric]
    """Return the metric of a task with these labels."""
    needs: int | Literal["two or more"] = "two or more"
    """The number of labels it needs."""

    def accepts(self, num_labels: int) -> bool:
        """Return whether a task with `num_labels` labels may use the metric; 0 means free text."""
        return num_labels >= 2 if isinstance(self.needs, str) else num_labels == self.needs


class HubSource(NamedTuple):
    """A data set on the Hugging Face hub, or in a folder of files `FOLDER/SPLIT.jsonl` with the hub's columns."""

    path: str
    """The name on the hub, such as `nyu-mll/glue`."""
    config: str | None
    folder: str
    """The folder within a local folder of data sets, such as `glue/cola`."""
    train: str | None = "train"
    """The split to train on; None for a task that is only evaluated."""
    validation: str | None = "validation"
    """The split to validate on; None holds out the end of the training split."""
    test: str | None = "test"
    num_train: int | None = None
    """Number of rows to train on if `validation` is None, and at most nine tenths of the rows, so that a shortened
    data set keeps some to validate on."""


class FilesSource(NamedTuple):
    """The JSON Lines files of a user's own task, as paths or globs."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    rules: str
    """The task's part of the recipe as JSON, which says how rows become texts. It is part of the fingerprint."""

    def paths(self, split: str) -> tuple[str, ...]:
        """Return the paths and globs of a split."""
        return self._asdict()[split]


class EmbeddedSource(NamedTuple):
    """Rows that the program generates without a download, for a training and a validation split."""

    rows: Callable[[Literal["train", "validation"]], Iterator[Row]]
    fingerprint: Callable[[], str]
    """Return a text that changes whenever the rows change."""


class Task(NamedTuple):
    """One text-to-text task."""

    name: str
    source: HubSource | FilesSource | EmbeddedSource
    columns: tuple[str, ...]
    """The columns that `examples` reads."""
    examples: Callable[[Row, Purpose], Iterable[Example]]
    """Return the examples of a row: one, several or none, as the benchmark prescribes.

    Raises ValueError for an invalid row. The message starts with the column's name and says what is wrong and what
    would be right."""
    metrics: tuple[Metric, ...]
    """The metrics whose mean is the task's score, as the benchmark defines it."""
    chance: float
    """The score of random answers, uniform over equally frequent labels; 0 for free text."""
    labels: tuple[str, ...] = ()
    """All possible right answers; empty for free text."""
    secondary_metrics: tuple[Metric, ...] = ()
    """Metrics that are reported but do not count in the score, such as F1 beside SQuAD's exact match."""

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """The metrics that count in the score, then those that do not."""
        return (*self.metrics, *self.secondary_metrics)
