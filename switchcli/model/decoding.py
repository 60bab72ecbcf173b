"""How a model's answers are decoded: greedily, by beam search, or drawn at random; the value that says so.

T5's settings (paper.md has none of its own): greedy or 4 beams with alpha 0.6, 128 tokens at most.

Legend: B rows, T steps, V vocabulary.
"""

import math
from typing import Final, Self

import torch
from pydantic import Field, model_validator

from switchcli.model.init import keyed_generator
from switchcli.spec import MOST, Spec

LARGEST_LOG_PENALTY: Final = 80.0
"""The logarithm of the largest length penalty; float32 overflows at 88.7."""


class Decoding(Spec):
    """How answers are decoded; the defaults are greedy."""

    max_tokens: int = Field(default=128, ge=1, le=MOST["row_tokens"])
    """The longest answer, its end included."""
    beams: int = Field(default=1, ge=1, le=MOST["beams"])
    """Answers that beam search carries along; 1 is greedy."""
    length_penalty: float = Field(default=0.6, ge=0.0)
    """alpha of T5's beam search, where an answer of n tokens scores log p / ((5 + n) / 6)**alpha."""
    temperature: float = Field(default=0.0, ge=0.0)
    """Tokens are drawn from softmax(logits / temperature); 0 takes the most probable."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest tokens whose probabilities sum to it (the nucleus)."""
    seed: int = Field(default=0, ge=0, le=MOST["seed"])
    """Of the draws: with it a row of a given number has the same answer, whatever is beside it."""

    @model_validator(mode="after")
    def _searches_or_draws(self) -> Self:
        if self.beams > 1 and self.temperature > 0.0:
            raise ValueError(
                f"beams ({self.beams}) search for the most probable answer, temperature ({self.temperature}) draws "
                "one: set beams to 1 or temperature to 0"
            )
        if self.beams > 1 and self.length_penalty * math.log((5.0 + self.max_tokens) / 6.0) > LARGEST_LOG_PENALTY:
            most = LARGEST_LOG_PENALTY / math.log((5.0 + self.max_tokens) / 6.0)
            raise ValueError(
                f"length_penalty ({self.length_penalty:g}) divides the scores of {self.max_tokens} tokens (max_tokens) "
                f"by more than float32 holds: set it to {math.floor(most)} or less"
            )
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise ValueError(
                f"top_p ({self.top_p}) narrows what is drawn, and at temperature 0 nothing is: set a temperature, such "
                "as 1.0, or leave top_p out"
            )
        return self

    def penalty(self, length: int) -> float:
        """What the log probability of an answer of so many tokens, its end included, is divided by."""
        return ((5.0 + length) / 6.0) ** self.length_penalty

    def draws(self, first: int, rows: int) -> "UniformDraws | None":
        """The random numbers of rows `first` and following; None where nothing is drawn."""
        return UniformDraws(self.seed, first, rows) if self.temperature > 0.0 else None

    def pick(self, logits_BV: torch.Tensor, draw_B: torch.Tensor | None) -> torch.Tensor:
        """int64 [B]: the most probable token, or the one that `draw_B`, uniform on [0, 1), falls on."""
        if draw_B is None:
            return logits_BV.argmax(-1)
        probability_BV = (logits_BV.double() / self.temperature).softmax(-1)
        if self.top_p == 1.0:
            return _at(probability_BV, draw_B)
        sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV
        return token_BV.gather(1, _at(sorted_BV.where(before_BV < self.top_p, 0.0), draw_B).unsqueeze(1)).squeeze(1)


class UniformDraws:
    """Uniform numbers for rows, each row's from a generator of its own, keyed by the seed and the row's number."""

    def __init__(self, seed: int, first: int, rows: int) -> None:
        self._generators = [keyed_generator(seed, f"row {row}") for row in range(first, first + rows)]

    def next(self) -> torch.Tensor:
        """float64 [B], in the host's memory."""
        return torch.cat([torch.rand(1, generator=each, dtype=torch.float64) for each in self._generators])


def _at(weight_BV: torch.Tensor, draw_B: torch.Tensor) -> torch.Tensor:
    """int64 [B]: where `draw_B` of the sum of the weights is passed; never at a weight of 0."""
    end_BV = weight_BV.cumsum(-1)
    total_B1 = end_BV[:, -1:]
    draw_B1 = draw_B.to(total_B1).unsqueeze(1) * total_B1
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # rounding may reach the total: behind the last
    return torch.searchsorted(end_BV, draw_B1.minimum(below_B1), right=True).squeeze(1)
