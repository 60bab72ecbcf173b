"""How even the experts of a layer are: their loads, and f and P of the load-balancing loss.

Legend: L sparse layers, G groups, E experts.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from switchcli.metric_names import LOAD_ENTROPY, MAX_LOAD
from switchcli.model.moe.stats import StackStats

MORE_BALANCE = "raise balance_loss_coef (or bias_rate, where biases balance)"
"""The fix of uneven experts, by the keys of their router."""
ROUNDING = 1e-12
"""Squared coefficient of variation up to which numbers are equal but for the rounding of float32."""


def variation(stats: StackStats) -> dict[str, torch.Tensor]:
    """Return how unequal f and P of the load-balancing loss are over the experts of a group, and their correlation.

    Of each, the sum over groups times the real tokens of a group [L]. The variations are squared coefficients of
    variation, E sum(f^2) - 1 and E sum(P^2) - 1. The correlation r is 0 where one of them is 0, so that in a group the
    loss without its coefficient is 1 + r sqrt(variation of f times that of P).
    """
    # f and P add up to 1, so these are their relative distances from the mean 1 / E. Squaring them loses no digits, as
    # the difference of E sum(f^2) and 1 would.
    # Stacks may have groups of different sizes, and so different numbers of them: groups without a token fill them up.
    fraction_LGE, probability_LGE = (
        pad_sequence([getattr(layer, field) for layer in stats], batch_first=True) * len(stats[0].load_E) - 1
        for field in ("fraction_GE", "probability_GE")
    )
    fraction_LG, probability_LG = fraction_LGE.square().mean(-1), probability_LGE.square().mean(-1)
    correlation_LG = (fraction_LGE * probability_LGE).mean(-1) / (fraction_LG * probability_LG).sqrt()
    correlation_LG = correlation_LG.where(torch.minimum(fraction_LG, probability_LG) > ROUNDING, 0.0)
    tokens_LG = pad_sequence([layer.tokens_G for layer in stats], batch_first=True)
    values = {
        "fraction_cv_squared": fraction_LG,
        "probability_cv_squared": probability_LG,
        "fraction_probability_correlation": correlation_LG,
    }
    return {name: (value_LG * tokens_LG).sum(1) for name, value_LG in values.items()}


def load_spread(load_LE: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return how evenly the tokens of each layer are spread over its experts: float64 [L] by name.

    `MAX_LOAD` is the largest load over the mean, 1 if all are equal; `LOAD_ENTROPY` is the entropy of the experts'
    shares in nats: log E if all are equal, 0 if one expert has all tokens. Both are 0 without tokens.
    """
    share_LE = load_LE.double() / load_LE.sum(1, keepdim=True).clamp(min=1)
    return {MAX_LOAD: share_LE.amax(1) * load_LE.shape[1], LOAD_ENTROPY: torch.special.entr(share_LE).sum(1)}
