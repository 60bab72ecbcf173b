"""Batches of a mixture of tasks: the packed rows of a run, and those of an evaluation.

Each task's rows come in epochs, each in its own random order. A task's epochs do not depend on the cycles of the
mixture (text_mixture.py).

Legend  R rows  S source  T target positions  K tasks
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.objectives.example_packing import PackedExamples
from switchcli.data.rng import ROW_SOURCES, TASKS, permutation
from switchcli.data.text_mixture import MixtureSchedule, MixtureSpec, RandomOrders, largest_remainder

_MIN_ROWS_PER_TASK = 1000
"""Minimum rows of a cycle for each task on average: rates are exact to a thousandth."""


class TaskMixtureSource(BatchSource):
    """Batches of `batch_rows` packed rows of several tasks."""

    def __init__(self, tasks: Mapping[str, PackedExamples], mixture: MixtureSpec, seed: int, batch_rows: int) -> None:
        self._tasks = tuple(tasks.values())
        self._batch_rows = batch_rows
        examples_K = np.array([len(packed.example_X) for packed in self._tasks])
        rows_K = np.array([packed.num_rows for packed in self._tasks])
        rates_K = mixture.rates(examples_K.tolist())
        self.rates: dict[str, float] = dict(zip(tasks, rates_K.tolist(), strict=True))
        """Each task's fraction of the examples that are shown."""
        # Rates are of examples. A row of a task with short examples shows many of them, so the task needs fewer rows.
        row_weight_K = rates_K * rows_K / examples_K
        self._schedule = MixtureSchedule(_rows_per_cycle(row_weight_K / row_weight_K.sum(), rows_K), seed)
        self._orders = RandomOrders(seed)

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Return rows first..first+count of the step's batch: [count, S] and [count, T]."""
        task_R, number_R = self._schedule(step * self._batch_rows + self.row_offset + np.arange(first, first + count))
        # A task's rows are numbered from the beginning of the run: number // rows is the epoch.
        row_R = np.empty_like(number_R)
        for task in np.unique(task_R):
            of_task_R = task_R == task
            num_rows = self._tasks[task].num_rows
            epoch_R, position_R = np.divmod(number_R[of_task_R], num_rows)
            row_R[of_task_R] = self._orders(num_rows, epoch_R, position_R, TASKS + int(task))
        return _gather_rows(self._tasks, task_R, row_R)


class InterleavedRows:
    """Every row of several packed tasks once, in a fixed random order, for evaluation."""

    def __init__(self, tasks: Sequence[PackedExamples]) -> None:
        self._tasks = tuple(tasks)
        rows_K = np.array([packed.num_rows for packed in tasks])
        self._end_K = np.cumsum(rows_K)
        self._start_K = self._end_K - rows_K
        self.num_rows = int(self._end_K[-1])
        self._order = permutation(self.num_rows, 0, 0, ROW_SOURCES)

    def rows(self, first: int, count: int) -> Batch:
        """Return rows first..first+count in this order: [count, S] and [count, T]."""
        index_R = self._order[first : first + count]  # among the rows of all tasks, task after task
        task_R = np.searchsorted(self._end_K, index_R, side="right")
        return _gather_rows(self._tasks, task_R, index_R - self._start_K[task_R])


def _gather_rows(tasks: Sequence[PackedExamples], task_R: NDArray[np.int64], row_R: NDArray[np.int64]) -> Batch:
    """Return a batch of rows, given by the task of each and its number in that task."""
    inputs_length, targets_length = tasks[0].lengths
    inputs_RS = np.empty((len(row_R), inputs_length), dtype=np.int64)
    targets_RT = np.empty((len(row_R), targets_length), dtype=np.int64)
    for task in np.unique(task_R):
        of_task_R = task_R == task
        inputs_RS[of_task_R], targets_RT[of_task_R] = tasks[task].rows(row_R[of_task_R])
    return Batch(torch.from_numpy(inputs_RS), torch.from_numpy(targets_RT))


def _rows_per_cycle(fractions_K: NDArray[np.float64], rows_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of each task in a cycle [K], close to these fractions.

    If the fractions are in proportion to the tasks' rows, a cycle shows every row once.
    """
    if np.allclose(fractions_K * rows_K.sum(), rows_K):
        return rows_K
    return largest_remainder(fractions_K, max(int(rows_K.sum()), _MIN_ROWS_PER_TASK * len(rows_K)))
