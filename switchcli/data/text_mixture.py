"""Mixtures of texts: the fraction of a run's rows that each language or corpus makes up.

Legend  K texts
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from switchcli.data.mixture_schedule import MixtureSchedule, largest_remainder
from switchcli.data.prepare.store import digest_of
from switchcli.errors import RecipeError
from switchcli.spec import Spec

_MIN_SMALLEST_ROWS = 100
"""Rows of the text with the smallest fraction in a cycle of the schedule: rounding then changes it by 1% at most."""
_MAX_CYCLE_ROWS = 2**20
"""Rows in a cycle of the schedule. The order of a cycle is in memory."""


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
