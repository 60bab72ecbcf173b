"""MixtureSchedule: which of several sources each row of a run comes from.

A run consists of cycles. In each cycle every source has a fixed number of rows, and the order of the rows is random.
Fractions are therefore exact, each row is a pure function of the seed and the row's number, and a resumed run replays
nothing. This file does not import torch, because processes that prepare text import it.

Legend  R rows  K sources
"""

from collections.abc import Callable
from functools import lru_cache, partial
from threading import Lock
from typing import Self

import numpy as np
from numpy.typing import NDArray

from switchcli.data.objectives.example_packing import concatenated_ranges
from switchcli.data.rng import ROW_SOURCES, permutation, philox, uniform

OrderFn = Callable[[int, int, int, int], NDArray[np.int64]]
"""A function of (size, seed, index, purpose) that returns the numbers 0..size in some order, such as `permutation`."""

_CACHED_CYCLES = 2
"""Cycles whose orders are kept: a batch may extend over the end of one, and the next batch is made ahead."""


class RandomOrders:
    """Random orders by index and purpose, with a cache of the newest ones. Several threads may call it."""

    def __init__(self, seed: int, max_cached: int = 64, order: OrderFn = permutation) -> None:
        self._lock = Lock()
        self._get = lru_cache(max_cached)(lambda size, index, purpose: order(size, seed, index, purpose))

    def __call__(
        self, size: int, index_R: NDArray[np.int64], position_R: NDArray[np.int64], purpose: int
    ) -> NDArray[np.int64]:
        """Return, for each row, the number at its position in the order of `size` numbers that has the row's index."""
        number_R = np.empty_like(position_R)
        for index in np.unique(index_R):
            has_index_R = index_R == index
            with self._lock:
                order = self._get(size, int(index), purpose)
            number_R[has_index_R] = order[position_R[has_index_R]]
        return number_R


class MixtureSchedule:
    """The source of each row of a run, and the row's number among those of the source."""

    def __init__(self, rows: NDArray[np.int64], seed: int, order: OrderFn = permutation) -> None:
        """`rows` [K] are the rows of each source in a cycle."""
        self._rows_K, self._end_K = rows, np.cumsum(rows)
        self._rows_per_cycle = int(self._end_K[-1])
        self._orders = RandomOrders(seed, _CACHED_CYCLES, order)

    @classmethod
    def spread_evenly(cls, rows: NDArray[np.int64], seed: int) -> Self:
        """Return a schedule that spreads each source's rows evenly over a cycle.

        After any row, the number of rows of each source is exact up to a row or two.
        """
        return cls(rows, seed, partial(_evenly_spread_order, rows))

    def __call__(self, row_R: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each row, and the row's number, from 0, among all rows of that source."""
        cycle_R, position_R = np.divmod(row_R, self._rows_per_cycle)
        # The row's index in its cycle before the order was applied: source k has the indices end[k - 1]..end[k].
        index_R = self._orders(self._rows_per_cycle, cycle_R, position_R, ROW_SOURCES)
        source_R = np.searchsorted(self._end_K, index_R, side="right")
        source_rows_R = self._rows_K[source_R]
        index_in_source_R = index_R - (self._end_K[source_R] - source_rows_R)
        return source_R, cycle_R * source_rows_R + index_in_source_R

    def gather(
        self, row_R: NDArray[np.int64], length: int, rows_of: Callable[[int, NDArray[np.int64]], NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """Return these rows [R, length]. `rows_of` returns rows of a source, given by their numbers in that source."""
        source_R, number_R = self(row_R)
        gathered = np.empty((len(row_R), length), dtype=np.int64)
        for source in np.unique(source_R):
            is_source_R = source_R == source
            gathered[is_source_R] = rows_of(int(source), number_R[is_source_R])
        return gathered

    def rows_per_source(self, num_rows: int) -> NDArray[np.int64]:
        """Return the number of rows of each source [K] among the first `num_rows` rows of a run."""
        num_cycles, rest = divmod(num_rows, self._rows_per_cycle)
        last_source_R, _ = self(num_rows - rest + np.arange(rest))  # the rows of the incomplete cycle
        return num_cycles * self._rows_K + np.bincount(last_source_R, minlength=len(self._rows_K))


def largest_remainder(fractions: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Divide `total` rows among sources in proportion to `fractions` [K], which add up to 1.

    Each source gets its rows rounded down, but at least 1. Rows that are left go to the largest remainders, one each.
    """
    exact = fractions * total
    rounded = np.maximum(1, np.floor(exact)).astype(np.int64)
    by_remainder = np.argsort(-(exact - rounded), kind="stable")
    num_left = max(0, total - int(rounded.sum()))
    rounded[by_remainder[:num_left]] += 1
    return rounded


def _evenly_spread_order(
    rows_K: NDArray[np.int64], size: int, seed: int, index: int, purpose: int
) -> NDArray[np.int64]:
    """Return an order of a cycle in which the n-th of a source's N rows is at a random point of n/N..(n + 1)/N."""
    number_in_source = concatenated_ranges(np.zeros_like(rows_K), rows_K)  # 0..N of each source, end to end
    offset = uniform(philox(seed, index, purpose).random_raw(size))
    point = (number_in_source + offset) / np.repeat(rows_K, rows_K)
    return np.argsort(point, kind="stable")
