"""Settings of decoding: greedy, beam search, or sampling; and how a token is picked from logits.

The defaults are T5's, as the paper gives none: greedy or 4 beams with alpha 0.6, at most 128 tokens.

Legend: B rows, V vocabulary.
"""

import math
from typing import Final, Self

import torch
from pydantic import Field, model_validator

from switchcli.model.init import keyed_generator
from switchcli.spec import LIMITS, Spec

LARGEST_LOG_PENALTY: Final = 80.0
"""Logarithm of the largest length penalty allowed; float32 overflows at 88.7."""


class Decoding(Spec):
    """Settings of decoding; the defaults decode greedily."""

    max_tokens: int = Field(default=128, ge=1, le=LIMITS["row_tokens"])
    """Maximum length of an answer in tokens, including its EOS; 128 is T5's."""
    beams: int = Field(default=1, ge=1, le=LIMITS["beams"])
    """Number of beams of beam search; 1 is greedy."""
    length_penalty: float = Field(default=0.6, ge=0.0)
    """Exponent alpha of T5's beam search, where an answer of n tokens scores log p / ((5 + n) / 6)**alpha."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Temperature of sampling from softmax(logits / temperature); 0 takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Probability of the nucleus, the fewest tokens that sum to it, to which sampling is limited; 1 is all tokens."""
    seed: int = Field(default=0, ge=0, le=LIMITS["seed"])
    """Seed of sampling; a row with a given number has the same answer in any batch."""

    @model_validator(mode="after")
    def _searches_or_samples(self) -> Self:
        if self.beams > 1 and self.temperature > 0.0:
            raise ValueError(
                f"beams ({self.beams}) search for the most probable answer, temperature ({self.temperature}) samples "
                "one: set beams to 1 or temperature to 0"
            )
        log_base = math.log((5.0 + self.max_tokens) / 6.0)
        if self.beams > 1 and self.length_penalty * log_base > LARGEST_LOG_PENALTY:
            raise ValueError(
                f"length_penalty ({self.length_penalty:g}) divides the scores of {self.max_tokens} tokens (max_tokens) "
                f"by more than float32 holds: set it to {math.floor(LARGEST_LOG_PENALTY / log_base)} or less"
            )
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise ValueError(
                f"top_p ({self.top_p}) restricts sampling, and at temperature 0 there is none: set a temperature, such "
                "as 1.0, or leave top_p out"
            )
        return self

    def penalty(self, length: int) -> float:
        """Return the divisor of the log probability of an answer of `length` tokens, including its EOS."""
        return ((5.0 + length) / 6.0) ** self.length_penalty

    def draws(self, first_row: int, num_rows: int) -> "UniformDraws | None":
        """Return the random numbers of the rows from `first_row` on, or None without sampling."""
        return UniformDraws(self.seed, first_row, num_rows) if self.temperature > 0.0 else None

    def pick(self, logits_BV: torch.Tensor, draw_B: torch.Tensor | None) -> torch.Tensor:
        """Return the next token of each row, int64 [B]: the most probable one, or the one that `draw_B` selects.

        Args:
            logits_BV: the logits of the next token.
            draw_B: numbers uniform on [0, 1); None takes the most probable tokens.
        """
        if draw_B is None:
            return logits_BV.argmax(-1)
        probability_BV = (logits_BV.double() / self.temperature).softmax(-1)
        if self.top_p == 1.0:
            return _sample(probability_BV, draw_B)
        # The nucleus: a token belongs to it if the more probable ones sum to less than top_p.
        sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        sum_before_BV = sorted_BV.cumsum(-1) - sorted_BV
        rank_B = _sample(sorted_BV.where(sum_before_BV < self.top_p, 0.0), draw_B)
        return token_BV.gather(1, rank_B.unsqueeze(1)).squeeze(1)


class UniformDraws:
    """Uniform random numbers of rows. Each row has a generator, keyed by the seed and the row's number."""

    def __init__(self, seed: int, first_row: int, num_rows: int) -> None:
        rows = range(first_row, first_row + num_rows)
        self._generators = [keyed_generator(seed, f"row {row}") for row in rows]

    def next(self) -> torch.Tensor:
        """Return the next number of each row: float64 [B] on the CPU."""
        return torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators])


def _sample(weight_BV: torch.Tensor, draw_B: torch.Tensor) -> torch.Tensor:
    """Return the index whose interval of the cumulative weights holds `draw_B` times their sum: int64 [B].

    An index with weight 0 has an empty interval and is never returned.
    """
    # Index i has the interval [end[i - 1], end[i]). right=True finds the first end that is greater than the draw.
    end_BV = weight_BV.cumsum(-1)
    total_B1 = end_BV[:, -1:]
    draw_B1 = draw_B.to(total_B1).unsqueeze(1) * total_B1
    # Rounding may make the product equal to the total, which is in no interval.
    largest_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    return torch.searchsorted(end_BV, draw_B1.minimum(largest_B1), right=True).squeeze(1)
