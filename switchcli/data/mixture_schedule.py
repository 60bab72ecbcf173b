"""Turns: which of several sources each row of a run is of. No torch here: processes that prepare text import this.

A run goes in turns: in each, every source has a fixed number of rows, in a random order. So the rates are exact, each
row is a pure function of the seed and its number, and resuming replays nothing.

Legend  R rows  K sources
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Self

import numpy as np
from numpy.typing import NDArray

from switchcli.data.objectives.example_packing import concatenated_ranges
from switchcli.data.rng import ROW_SOURCES, permutation, philox

OrderFn = Callable[[int, int, int, int], NDArray[np.int64]]
"""An order of so many things, by seed, number and purpose: `permutation`, or one less random."""

_CACHED_ORDERS = 2


class RandomOrders:
    """Random orders by their number and purpose, the last ones kept. Workers may ask at the same time."""

    def __init__(self, seed: int, kept: int = 64, order: OrderFn = permutation) -> None:
        self._seed, self._most, self._order = seed, kept, order
        self._kept: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()
        self._lock = Lock()

    def __call__(
        self, size: int, number_R: NDArray[np.int64], place_R: NDArray[np.int64], purpose: int
    ) -> NDArray[np.int64]:
        """What stands at each place of the order of that number, of `size` things."""
        found_R = np.empty_like(place_R)
        for number in np.unique(number_R):
            here = number_R == number
            found_R[here] = self._ordered(size, int(number), purpose)[place_R[here]]
        return found_R

    def _ordered(self, size: int, number: int, purpose: int) -> NDArray[np.int64]:
        with self._lock:
            if (number, purpose) not in self._kept:
                self._kept[number, purpose] = self._order(size, self._seed, number, purpose)
                if len(self._kept) > self._most:
                    self._kept.popitem(last=False)
            return self._kept[number, purpose]


class MixtureSchedule:
    """Which source each row of a run is of, and which of the source's rows it is."""

    def __init__(self, rows: NDArray[np.int64], seed: int, order: OrderFn = permutation) -> None:
        """`rows` [K]: rows of each source in a turn."""
        self._rows_K, self._end_K = rows, np.cumsum(rows)
        self._orders = RandomOrders(seed, _CACHED_ORDERS, order)

    @classmethod
    def spread_evenly(cls, rows: NDArray[np.int64], seed: int) -> Self:
        """Turns in which each source's rows are spread evenly: at any row the shares are kept, to a row or two."""
        return cls(rows, seed, partial(_spread, rows))

    def __call__(self, row_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each row, and its number, from 0, among the rows of that source."""
        turn_R, place_R = np.divmod(row_R, self._end_K[-1])
        place_R = self._orders(int(self._end_K[-1]), turn_R, place_R, ROW_SOURCES)
        source_R = np.searchsorted(self._end_K, place_R, side="right")
        each_R = self._rows_K[source_R]
        return source_R, turn_R * each_R + place_R - (self._end_K[source_R] - each_R)

    def rows_per_source(self, num_rows: int) -> NDArray[np.int64]:
        """How many of the first `num_rows` rows of a run are of each source [K]."""
        turns, rest = divmod(num_rows, int(self._end_K[-1]))
        begun_R = self(num_rows - rest + np.arange(rest))[0]
        return turns * self._rows_K + np.bincount(begun_R, minlength=len(self._rows_K))


def largest_remainder(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Of about `total` rows as many for each source as its share says, and one at least: largest remainders first."""
    exact = shares * total
    whole = np.maximum(1, np.floor(exact)).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: max(0, total - int(whole.sum()))]] += 1
    return whole


def _spread(rows_K: NDArray[np.int64], size: int, seed: int, number: int, purpose: int) -> NDArray[np.int64]:
    """An order in which the n-th of a source's N rows comes at random between n/N and (n+1)/N of the turn."""
    random = (philox(seed, number, purpose).random_raw(size) >> np.uint64(11)) * 2.0**-53
    return np.argsort(
        (concatenated_ranges(np.zeros_like(rows_K), rows_K) + random) / np.repeat(rows_K, rows_K), kind="stable"
    )
