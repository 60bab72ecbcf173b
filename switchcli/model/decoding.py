"""Settings of decoding: greedy, beam search, or sampling. How a token is picked by them is in sampling.py.

The defaults are T5's, as the paper gives none: greedy or 4 beams with alpha 0.6, at most 128 tokens.
"""

import math
from typing import Final, Self

from pydantic import Field, model_validator

from switchcli.spec import MAX_SEED, Few, Size, Spec

LARGEST_LOG_PENALTY: Final = 80.0
"""Logarithm of the largest length penalty allowed; float32 overflows at 88.7."""


class Search(Spec):
    """Settings of the search for the most probable answer; the defaults decode greedily."""

    max_tokens: Size = 128
    """Maximum length of an answer in tokens, including its EOS; 128 is T5's."""
    beams: Few = 1
    """Number of beams of beam search; 1 is greedy."""
    length_penalty: float = Field(default=0.6, ge=0.0)
    """Exponent alpha of T5's beam search, where an answer of n tokens scores log p / ((5 + n) / 6)**alpha."""

    @model_validator(mode="after")
    def _penalty_is_finite(self) -> Self:
        log_base = math.log((5.0 + self.max_tokens) / 6.0)
        if self.beams > 1 and self.length_penalty * log_base > LARGEST_LOG_PENALTY:
            raise ValueError(
                f"length_penalty ({self.length_penalty:g}) divides the scores of {self.max_tokens} tokens (max_tokens) "
                f"by more than float32 holds: set it to {math.floor(LARGEST_LOG_PENALTY / log_base)} or less"
            )
        return self

    def penalty(self, length: int) -> float:
        """Return the divisor of the log probability of an answer of `length` tokens, including its EOS."""
        return ((5.0 + length) / 6.0) ** self.length_penalty


class Decoding(Search):
    """Settings of decoding: a search, or sampling."""

    temperature: float = Field(default=0.0, ge=0.0)
    """Temperature of sampling from softmax(logits / temperature); 0 takes the most probable token."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Probability of the nucleus, the fewest tokens that sum to it, to which sampling is limited; 1 is all tokens."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seed of sampling; a row with a given number has the same answer in any batch."""

    @model_validator(mode="after")
    def _searches_or_samples(self) -> Self:
        if self.beams > 1 and self.temperature > 0.0:
            raise ValueError(
                f"beams ({self.beams}) search for the most probable answer, temperature ({self.temperature}) samples "
                "one: set beams to 1 or temperature to 0"
            )
        if self.top_p < 1.0 and self.temperature == 0.0:
            raise ValueError(
                f"top_p ({self.top_p}) restricts sampling, and at temperature 0 there is none: set a temperature, such "
                "as 1.0, or leave top_p out"
            )
        return self
