"""Mixtures: the fraction of a run's rows that each text makes up, and which text or task each row comes from.

A run consists of cycles (`MixtureSchedule`). In each cycle every source has a fixed number of rows, and the order of
the rows is random. Fractions are therefore exact, each row is a pure function of the seed and the row's number, and a
resumed run replays nothing. The batches of a mixture of tasks are in task_batches.py.

This file does not import torch, because processes that prepare text import it.

Legend  R rows  K sources: texts or tasks
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from threading import Lock
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from switchcli.data.objectives.example_packing import concatenated_ranges
from switchcli.data.prepare.store import digest_of
from switchcli.data.rng import ROW_SOURCES, permutation, philox, uniform
from switchcli.errors import RecipeError
from switchcli.spec import Count, Spec

_MIN_SMALLEST_ROWS = 100
"""Rows of the text with the smallest fraction in a cycle of the schedule: rounding then changes it by 1% at most."""
_MAX_CYCLE_ROWS = 2**20
"""Rows in a cycle of the schedule. The order of a cycle is in memory."""
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


class JoinedTexts(Spec):
    """All corpora as one text, in proportion to their sizes."""

    kind: Literal["joined"] = "joined"
    """`joined` makes one text of all corpora."""
    uses_weights: ClassVar[bool] = False
    uses_sizes: ClassVar[bool] = False


class TextMixing(Spec, ABC):
    """A rule for the fraction of the rows that each language, or corpus without a language, makes up."""

    uses_weights: ClassVar[bool] = False
    """Whether the fractions depend on the `weight` of each corpus. If not, a recipe that sets one is refused."""
    uses_sizes: ClassVar[bool] = True
    """Whether the fractions depend on the size of each text. If so, streamed texts of unknown size are refused."""
    max_epochs: float | None = Field(default=None, gt=0.0)
    """Epochs of a text that a run shows at most. Rows that a small text cannot fill go to the others, in proportion."""

    @abstractmethod
    def weights(self, tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return unnormalized fractions [K] of texts with `tokens` [K] tokens and `weights` [K] in the recipe."""

    def row_fractions(
        self, tokens: Sequence[int], weights: Sequence[float], rows_per_epoch: Sequence[int], num_rows: int
    ) -> NDArray[np.float64]:
        """Return the fraction of each text [K] in a run of `num_rows` rows. They add up to 1.

        Raises:
            RecipeError: the texts are too small for `max_epochs`.
        """
        weights_K = self.weights(np.asarray(tokens), np.asarray(weights))
        fraction_K = weights_K / weights_K.sum()
        if self.max_epochs is None:
            return fraction_K
        max_fraction_K = self.max_epochs * np.asarray(rows_per_epoch) / num_rows
        if max_fraction_K.sum() < 1 - 1e-9:  # rounded, as an advised value may be
            least_epochs = math.ceil(100 * self.max_epochs / max_fraction_K.sum()) / 100
            raise RecipeError(
                f"data.mixture.max_epochs ({self.max_epochs:g}): all texts together are {sum(rows_per_epoch):,} rows, "
                f"and the run takes {num_rows:,}: raise it to {least_epochs:.2f}, take fewer train.steps, or add text"
            )
        # Texts above their limit are fixed there, and the others divide the rest by their weights. That may raise
        # further texts above their limits, so it is repeated: at most K times, since no text is released again.
        is_limited_K = np.zeros(len(fraction_K), dtype=np.bool_)
        while (over_K := fraction_K > max_fraction_K).any():
            is_limited_K |= over_K
            free_K = np.where(is_limited_K, 0.0, weights_K)
            remaining = 1 - max_fraction_K[is_limited_K].sum()
            # Where all texts are limited, the sum of `free_K` is 0 and nothing remains to divide.
            fraction_K = np.where(is_limited_K, max_fraction_K, free_K / (free_K.sum() or 1.0) * remaining)
        return fraction_K


class WeightedMixing(TextMixing):
    """Fractions in proportion to the `weight` of each corpus."""

    kind: Literal["weighted"] = "weighted"
    """`weighted` mixes the texts by the `weight` of each corpus."""
    uses_weights: ClassVar[bool] = True
    uses_sizes: ClassVar[bool] = False

    def weights(self, tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights


class TemperatureMixing(TextMixing):
    """Fractions in proportion to tokens ** alpha, as in mT5. A stream counts the bytes of its files instead."""

    kind: Literal["temperature"] = "temperature"
    """`temperature` mixes the texts in proportion to tokens ** alpha."""
    alpha: float = Field(default=0.3, ge=0.0, le=1.0)
    """Exponent of the size: 1 keeps the proportions, 0 makes all texts equal. mT5 uses 0.3."""

    def weights(self, tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((tokens / tokens.max()) ** self.alpha)


TextMixtureSpec = Annotated[JoinedTexts | WeightedMixing | TemperatureMixing, Field(discriminator="kind")]


class TextMixture:
    """The fraction of each text in a run, and the schedules that assign a text to every row."""

    def __init__(self, fractions: Mapping[str, float], seed: int, stream_shards: int = 1) -> None:
        """Build the schedules. The rows of a step are divided among `stream_shards`, each with a schedule of its own.

        Raises:
            RecipeError: a fraction is too small for a schedule.
        """
        # Powers and sums differ in their last bits among processors. Rounding makes schedules and identity the same.
        self.fractions = {label: round(fraction, 12) for label, fraction in fractions.items()}
        """Intended fraction of the rows, by the label of the text."""
        fraction_K = np.array(list(self.fractions.values()))
        if fraction_K.min() * _MAX_CYCLE_ROWS < 1:
            label = min(self.fractions, key=lambda label: self.fractions[label])
            raise RecipeError(
                f"data.mixture: the share of {label} is {self.fractions[label]:.2g}, less than a row in "
                f"{_MAX_CYCLE_ROWS:,}: leave it out, or give it the language of another corpus"
            )
        # A cycle is long enough for _MIN_SMALLEST_ROWS rows of the smallest text. The subtraction keeps a quotient that
        # is a whole number but for rounding from being rounded up to the next one.
        least_rows = np.ceil(_MIN_SMALLEST_ROWS / fraction_K.min() - 1e-6)
        cycle_rows = int(np.clip(least_rows, _MIN_SMALLEST_ROWS * len(fraction_K), _MAX_CYCLE_ROWS))
        rows_K = largest_remainder(fraction_K, cycle_rows)
        self.identity = digest_of({label: int(count) for label, count in zip(self.fractions, rows_K, strict=True)})
        """Digest of all that the schedules depend on except the seed."""
        self.schedules = tuple(
            MixtureSchedule.spread_evenly(rows_K, seed + stream_shard * 2**32) for stream_shard in range(stream_shards)
        )
        """Schedule of each stream shard."""

    def fractions_after(self, num_rows: int) -> dict[str, float]:
        """Return the fraction of each text in the first `num_rows` rows, which must be whole steps."""
        # Every stream shard makes the same number of the rows of a step.
        rows_per_shard = num_rows // len(self.schedules)
        counts = [schedule.rows_per_source(rows_per_shard) for schedule in self.schedules]
        fraction_K = np.sum(counts, axis=0) / max(1, num_rows)
        return dict(zip(self.fractions, fraction_K.tolist(), strict=True))

    def compare_with_intended(self, num_rows: int) -> dict[str, dict[str, float]]:
        """Return `fractions_after(num_rows)` as `shown` and the run's fractions as `intended`, for each text."""
        shown = self.fractions_after(num_rows)
        return {label: {"shown": shown[label], "intended": fraction} for label, fraction in self.fractions.items()}


class Proportional(Spec):
    """T5's mixture in proportion to size: the rate of a task is min(examples, cap) ** (1 / temperature)."""

    kind: Literal["proportional"] = "proportional"
    """`proportional` samples tasks in proportion to their numbers of examples."""
    cap: Count | None = None
    """Number of examples beyond which a larger task is not shown more often, so that it does not drown small ones."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Smoothing of the rates: at 1 they are in proportion to the examples, above 1 closer to each other."""

    def rates(self, num_examples: Sequence[int]) -> NDArray[np.float64]:
        """Return each task's fraction of the examples that are shown [K]; they add up to 1."""
        capped = np.minimum(num_examples, np.inf if self.cap is None else self.cap)
        # capped ** (1 / temperature), up to a factor: ratios to the maximum do not overflow at small temperatures.
        weights = np.exp(np.log(capped / capped.max()) / self.temperature)
        return weights / weights.sum()


class Equal(Spec):
    """A mixture that shows every task equally often."""

    kind: Literal["equal"] = "equal"
    """`equal` samples all tasks equally often."""

    def rates(self, num_examples: Sequence[int]) -> NDArray[np.float64]:
        return np.full(len(num_examples), 1 / len(num_examples))


MixtureSpec = Annotated[Proportional | Equal, Field(discriminator="kind")]
