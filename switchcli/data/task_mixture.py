"""Mixtures of tasks: how often each is shown, and the rows of a run by that. A task's own rows come in epochs, each in
an order of its own, that go on from turn to turn (mixture_schedule.py).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.mixture_schedule import MixtureSchedule, RandomOrders, largest_remainder
from switchcli.data.objectives.example_packing import PackedExamples
from switchcli.data.rng import ROW_SOURCES, TASKS, permutation
from switchcli.spec import MOST, Spec

_LEAST_ROWS = 1000
"""Rows of a turn at least, for each task: rates are kept to a thousandth."""


class Proportional(Spec):
    """T5's: the rate of a task is min(examples, cap) ** (1 / temperature)."""

    kind: Literal["proportional"] = "proportional"
    cap: int | None = Field(default=None, ge=1, le=MOST["count"])
    """Examples beyond it do not raise a task's rate: it keeps a large task from drowning small ones."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Above 1 the rates come closer to each other."""

    def rates(self, num_examples: Sequence[int]) -> NDArray[np.float64]:
        """Each task's share of the examples shown: they add up to 1."""
        capped = np.minimum(num_examples, np.inf if self.cap is None else self.cap)
        weights = np.exp(np.log(capped / capped.max()) / self.temperature)
        return weights / weights.sum()


class Equal(Spec):
    """Each task as often as any other."""

    kind: Literal["equal"] = "equal"

    def rates(self, num_examples: Sequence[int]) -> NDArray[np.float64]:
        return np.full(len(num_examples), 1 / len(num_examples))


MixtureSpec = Annotated[Proportional | Equal, Field(discriminator="kind")]


class TaskMixtureSource(BatchSource):
    """Rows of several packed tasks, `batch_rows` a step."""

    def __init__(self, tasks: Mapping[str, PackedExamples], mixture: MixtureSpec, seed: int, batch_rows: int) -> None:
        self._tasks = tuple(tasks.values())
        self._batch_rows = batch_rows
        examples = np.array([len(packed.example_X) for packed in self._tasks])
        rows = np.array([packed.num_rows for packed in self._tasks])
        self.rates: dict[str, float] = dict(zip(tasks, mixture.rates(examples.tolist()).tolist(), strict=True))
        """Each task's share of the examples."""
        # A row of a task with short examples shows many of them, so that it takes fewer rows.
        share = np.array(list(self.rates.values())) * rows / examples
        self._turns, self._orders = MixtureSchedule(_shared_out(share / share.sum(), rows), seed), RandomOrders(seed)

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Rows first..first+count of the step's batch: [count, S] and [count, T]."""
        task_R, nth_R = self._turns(step * self._batch_rows + np.arange(first, first + count))
        row_R = np.empty_like(nth_R)
        for task in np.unique(task_R):
            mine = task_R == task
            num_rows = self._tasks[task].num_rows
            epoch_R, place_R = np.divmod(nth_R[mine], num_rows)
            row_R[mine] = self._orders(num_rows, epoch_R, place_R, TASKS + int(task))
        return _gathered(self._tasks, task_R, row_R)


class InterleavedRows:
    """Every row of several packed tasks once, in an order that is the same each time: for evaluation."""

    def __init__(self, tasks: Sequence[PackedExamples]) -> None:
        self._tasks = tuple(tasks)
        self._end = np.cumsum([packed.num_rows for packed in tasks])
        self.num_rows = int(self._end[-1])
        self._order = permutation(self.num_rows, 0, 0, ROW_SOURCES)

    def rows(self, first: int, count: int) -> Batch:
        place_R = self._order[first : first + count]
        task_R = np.searchsorted(self._end, place_R, side="right")
        return _gathered(
            self._tasks, task_R, place_R - (self._end - [packed.num_rows for packed in self._tasks])[task_R]
        )


def _gathered(tasks: Sequence[PackedExamples], task_R: NDArray[np.int64], row_R: NDArray[np.int64]) -> Batch:
    """A batch of the rows of several tasks."""
    inputs, targets = (np.empty((len(row_R), length), dtype=np.int64) for length in tasks[0].lengths)
    for task in np.unique(task_R):
        mine = task_R == task
        inputs[mine], targets[mine] = tasks[task].rows(row_R[mine])
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def _shared_out(shares: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each task in a turn: all of them once where the shares say so, else as near to the shares as it gets."""
    if np.allclose(shares * rows.sum(), rows):
        return rows
    return largest_remainder(shares, max(int(rows.sum()), _LEAST_ROWS * len(rows)))
