"""Mixtures: how often each of several sources is shown, and Turns, which says whose row each row of a run is.

A run goes in turns: in each, every source has a fixed number of rows, in a random order. So the rates are exact, each
row is a pure function of the seed and its number, and resuming replays nothing. A task's own rows come in epochs, each
in an order of its own, that go on from turn to turn.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from switchcli.data.batch import Batch
from switchcli.data.draws import TASKS, TURNS, permutation
from switchcli.data.packing import Packed
from switchcli.spec import Spec

_LEAST_ROWS = 1000
"""Rows of a turn at least, for each task: rates are kept to a thousandth."""
_KEPT_ORDERS = 64


class Proportional(Spec):
    """T5's: the rate of a task is min(examples, cap) ** (1 / temperature)."""

    kind: Literal["proportional"] = "proportional"
    cap: int | None = Field(default=None, ge=1)
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


class Orders:
    """Random orders by their number and purpose, the last ones kept. Workers may ask at the same time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._kept: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self._lock = Lock()

    def __call__(
        self, size: int, number_R: NDArray[np.int64], place_R: NDArray[np.int64], purpose: int
    ) -> NDArray[np.int64]:
        """What stands at each place of the order of that number, of `size` things."""
        found_R = np.empty_like(place_R)
        for number in np.unique(number_R):
            here = number_R == number
            found_R[here] = self._order(size, int(number), purpose)[place_R[here]]
        return found_R

    def _order(self, size: int, number: int, purpose: int) -> NDArray[np.int64]:
        with self._lock:
            if (number, purpose) not in self._kept:
                self._kept[number, purpose] = permutation(size, self._seed, number, purpose)
                if len(self._kept) > _KEPT_ORDERS:
                    self._kept.popitem(last=False)
            return self._kept[number, purpose]


class Turns:
    """Which source each row of a run is of, and which of the source's rows it is."""

    def __init__(self, rows: NDArray[np.int64], seed: int) -> None:
        """`rows` [K]: rows of each source in a turn."""
        self._rows_K, self._end_K = rows, np.cumsum(rows)
        self._orders = Orders(seed)

    def __call__(self, row_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each row, and its number, from 0, among the rows of that source."""
        turn_R, place_R = np.divmod(row_R, self._end_K[-1])
        place_R = self._orders(int(self._end_K[-1]), turn_R, place_R, TURNS)
        source_R = np.searchsorted(self._end_K, place_R, side="right")
        each_R = self._rows_K[source_R]
        return source_R, turn_R * each_R + place_R - (self._end_K[source_R] - each_R)

    def shown(self, num_rows: int) -> NDArray[np.int64]:
        """How many of the first `num_rows` rows of a run are of each source [K]."""
        turns, rest = divmod(num_rows, int(self._end_K[-1]))
        begun_R = self(num_rows - rest + np.arange(rest))[0]
        return turns * self._rows_K + np.bincount(begun_R, minlength=len(self._rows_K))


class TaskStream:
    """Rows of several packed tasks, `batch_rows` a step."""

    def __init__(self, tasks: Mapping[str, Packed], mixture: MixtureSpec, seed: int, batch_rows: int) -> None:
        self._tasks = tuple(tasks.values())
        self._batch_rows = batch_rows
        examples = np.array([len(packed.example_X) for packed in self._tasks])
        rows = np.array([packed.num_rows for packed in self._tasks])
        self.rates: dict[str, float] = dict(zip(tasks, mixture.rates(examples.tolist()).tolist(), strict=True))
        """Each task's share of the examples."""
        # A row of a task with short examples shows many of them, so that it takes fewer rows.
        share = np.array(list(self.rates.values())) * rows / examples
        self._turns, self._orders = Turns(_shared_out(share / share.sum(), rows), seed), Orders(seed)

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


class InTurn:
    """Every row of several packed tasks once, in an order that is the same each time: for evaluation."""

    def __init__(self, tasks: Sequence[Packed]) -> None:
        self._tasks = tuple(tasks)
        self._end = np.cumsum([packed.num_rows for packed in tasks])
        self.num_rows = int(self._end[-1])
        self._order = permutation(self.num_rows, 0, 0, TURNS)

    def rows(self, first: int, count: int) -> Batch:
        place_R = self._order[first : first + count]
        task_R = np.searchsorted(self._end, place_R, side="right")
        return _gathered(
            self._tasks, task_R, place_R - (self._end - [packed.num_rows for packed in self._tasks])[task_R]
        )


def _gathered(tasks: Sequence[Packed], task_R: NDArray[np.int64], row_R: NDArray[np.int64]) -> Batch:
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
    return apportioned(shares, max(int(rows.sum()), _LEAST_ROWS * len(rows)))


def apportioned(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Of about `total` rows as many for each source as its share says, and one at least: largest remainders first."""
    exact = shares * total
    whole = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: max(0, total - int(whole.sum()))]] += 1
    return whole
