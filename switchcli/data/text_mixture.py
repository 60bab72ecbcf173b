"""Mixtures of texts: the share of the rows that each language or corpus has.

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

_LEAST_ROWS = 100
"""Rows of a turn for the smallest share at least: it is kept to a hundredth."""
_MOST_ROWS = 2**20
"""Rows of a turn at most: its order is held in memory."""


class JoinedTexts(Spec):
    """No mixture: the corpora are one text, in proportion to their size."""

    kind: Literal["joined"] = "joined"
    uses_weights: ClassVar[bool] = False
    uses_sizes: ClassVar[bool] = False


class TextMixing(Spec, ABC):
    """Each language, or corpus without one, by itself."""

    uses_weights: ClassVar[bool] = False
    """The shares depend on the `weight` of each corpus; otherwise a recipe that gives one is refused."""
    uses_sizes: ClassVar[bool] = True
    """The shares depend on the size of each text, so a stream of texts of unknown size is refused."""
    max_epochs: float | None = Field(default=None, gt=0.0)
    """How often a run shows a text at most: what a small one may not have goes to the others, in proportion."""

    @abstractmethod
    def weights(self, tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """What the shares are in proportion to, of texts of so many tokens with these weights in the recipe [K]."""

    def shares(
        self, tokens: Sequence[int], weights: Sequence[float], rows_per_epoch: Sequence[int], rows: int
    ) -> NDArray[np.float64]:
        """The share of each text in the `rows` of a run [K]; they add up to 1.

        Raises:
            RecipeError: the texts are too small for `max_epochs`.
        """
        wanted = self.weights(np.asarray(tokens), np.asarray(weights))
        shares = wanted / wanted.sum()
        if self.max_epochs is None:
            return shares
        most = self.max_epochs * np.asarray(rows_per_epoch) / rows
        if most.sum() < 1:
            raise RecipeError(
                f"data.mixture.max_epochs ({self.max_epochs:g}): all texts together are {sum(rows_per_epoch):,} rows, "
                f"and the run takes {rows:,}: raise it to {math.ceil(100 * self.max_epochs / most.sum()) / 100:.2f}, "
                "take fewer train.steps, or add text"
            )
        full = np.zeros(len(shares), dtype=np.bool_)
        while (over := shares > most).any():
            full |= over
            rest = np.where(full, 0.0, wanted)
            shares = np.where(full, most, rest / (rest.sum() or 1.0) * (1 - most[full].sum()))
        return shares


class WeightedMixing(TextMixing):
    """By the `weight` of each corpus."""

    kind: Literal["weighted"] = "weighted"
    uses_weights: ClassVar[bool] = True
    uses_sizes: ClassVar[bool] = False

    def weights(self, tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights


class TemperatureMixing(TextMixing):
    """By the size of each text, smoothed: p ~ tokens ** alpha (mT5: 0.3); of a stream by the bytes of its files."""

    kind: Literal["temperature"] = "temperature"
    alpha: float = Field(default=0.3, ge=0.0, le=1.0)
    """1: in proportion to size; 0: all alike."""

    def weights(self, tokens: NDArray[np.int64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((tokens / tokens.max()) ** self.alpha)


TextMixtureSpec = Annotated[JoinedTexts | WeightedMixing | TemperatureMixing, Field(discriminator="kind")]


class TextMixture:
    """Shares that are settled: the rows of a run by text."""

    def __init__(self, shares: Mapping[str, float], seed: int, lanes: int = 1) -> None:
        """`lanes` share the rows of each step, and each takes turns of its own.

        Raises:
            RecipeError: a share is too small to be kept.
        """
        # The last bits of a power are the processor's.
        self.shares = {label: round(share, 12) for label, share in shares.items()}
        """Intended, by label."""
        intended = np.array(list(self.shares.values()))
        if intended.min() * _MOST_ROWS < 1:
            label = min(self.shares, key=lambda one: self.shares[one])
            raise RecipeError(
                f"data.mixture: the share of {label} is {self.shares[label]:.2g}, less than a row in {_MOST_ROWS:,}: "
                "leave it out, or give it the language of another corpus"
            )
        rows = int(np.clip(np.ceil(_LEAST_ROWS / intended.min() - 1e-6), _LEAST_ROWS * len(intended), _MOST_ROWS))
        each = largest_remainder(intended, rows)
        self.identity = digest_of({label: int(number) for label, number in zip(self.shares, each, strict=True)})
        """A digest of whose row each is, but for the seed."""
        self.turns = tuple(MixtureSchedule.spread_evenly(each, seed + lane * 2**32) for lane in range(lanes))
        """Of each lane."""

    def shares_after(self, num_rows: int) -> dict[str, float]:
        """The share of each text in the first `num_rows` rows, those of whole steps."""
        each = [turns.rows_per_source(num_rows // len(self.turns)) for turns in self.turns]
        return dict(zip(self.shares, (np.sum(each, axis=0) / max(1, num_rows)).tolist(), strict=True))

    def compare_with_intended(self, num_rows: int) -> dict[str, dict[str, float]]:
        """The same beside what was intended."""
        shown = self.shares_after(num_rows)
        return {label: {"shown": shown[label], "intended": share} for label, share in self.shares.items()}
