"""How the next token is picked from logits, by the settings of decoding.py, and the random numbers of sampling.

Legend: B rows, V vocabulary.
"""

import torch

from switchcli.model.decoding import Decoding
from switchcli.model.init import keyed_generator


class UniformDraws:
    """Uniform random numbers of rows. Each row has a generator, keyed by the seed and the row's number."""

    def __init__(self, seed: int, first_row: int, num_rows: int) -> None:
        rows = range(first_row, first_row + num_rows)
        self._generators = [keyed_generator(seed, f"row {row}") for row in rows]

    def next(self) -> torch.Tensor:
        """Return the next number of each row: float64 [B] on the CPU."""
        return torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators])


def pick(decoding: Decoding, logits_BV: torch.Tensor, draw_B: torch.Tensor | None) -> torch.Tensor:
    """Return the next token of each row, int64 [B]: the most probable one, or the one that `draw_B` selects.

    Args:
        decoding: the temperature and the nucleus.
        logits_BV: the logits of the next token.
        draw_B: numbers uniform on [0, 1); None takes the most probable tokens.
    """
    if draw_B is None:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double()  # less the largest, so that no quotient by a tiny temperature overflows upwards
    probability_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / decoding.temperature).softmax(-1)
    if decoding.top_p == 1.0:
        return _sample(probability_BV, draw_B)
    # The nucleus: a token belongs to it if the more probable ones sum to less than top_p.
    sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
    sum_before_BV = sorted_BV.cumsum(-1) - sorted_BV
    rank_B = _sample(sorted_BV.where(sum_before_BV < decoding.top_p, 0.0), draw_B)
    return token_BV.gather(1, rank_B.unsqueeze(1)).squeeze(1)


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
