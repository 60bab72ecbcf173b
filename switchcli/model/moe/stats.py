"""What a sparse layer tells of its routing: what its losses need, and its health.

Legend: G groups, N tokens a group, E experts, K choices of a token.
"""

from typing import NamedTuple

import torch


class RouterStats(NamedTuple):
    """What one sparse layer did in one forward pass; `probability_GE` and `z_sum` carry gradients."""

    fraction_GE: torch.Tensor
    """f of eq. 5: the real tokens' choices that fell on each expert, as a share, before the capacity cut any."""
    probability_GE: torch.Tensor
    """P of eq. 6: the mean probability of each expert over real tokens."""
    tokens_G: torch.Tensor
    """float32: real tokens of each group. Padding is not routed."""
    z_sum: torch.Tensor
    """float32 scalar: sum over real tokens of logsumexp(h)**2, the router z-loss (ST-MoE, beyond the paper)."""
    load_E: torch.Tensor
    """Choices that fell on each expert, before the capacity cut any: of expert choice, its filled slots."""
    dropped: torch.Tensor
    """Real tokens in no slot."""
    entropy: torch.Tensor
    """Sum over real tokens of the entropy of p(x), in nats: at most tokens * log(E)."""
    confidence: torch.Tensor
    """Sum over real tokens of the largest p_i(x)."""

    @property
    def tokens(self) -> torch.Tensor:
        """float32 scalar: real tokens of all groups."""
        return self.tokens_G.sum()

    @property
    def load_balancing_sum(self) -> torch.Tensor:
        """float32 scalar: E * sum_i f_i P_i (eq. 4 without alpha) times the real tokens of a group, summed over groups.

        It is a sum over tokens, as the cross-entropy is. Divided by the real tokens of the whole step it depends on
        neither microbatches nor ranks, and a group of two tokens counts as two.
        """
        balance_G = self.fraction_GE.shape[1] * (self.fraction_GE * self.probability_GE).sum(1)
        return (balance_G * self.tokens_G).sum()

    @property
    def load_balancing_loss(self) -> torch.Tensor:
        """float32 scalar: the mean of `balance_sum` over real tokens; 1 when routing is uniform, 0 without tokens."""
        return self.load_balancing_sum / self.tokens.clamp(min=1)

    @property
    def z_loss(self) -> torch.Tensor:
        """float32 scalar: the mean of `z_sum` over real tokens."""
        return self.z_sum / self.tokens.clamp(min=1)


StackStats = tuple[RouterStats, ...]
"""One for each sparse layer, in the order of the forward pass."""


def router_stats(
    logits_GNE: torch.Tensor,
    real_GN: torch.Tensor,
    fraction_GE: torch.Tensor,
    load_GE: torch.Tensor,
    placed_GN: torch.Tensor,
) -> RouterStats:
    """The report of one assignment; `placed_GN` says which tokens are in a slot, the others are named as above."""
    log_probability_GNE = logits_GNE.float().log_softmax(-1)
    probability_GNE = log_probability_GNE.exp()
    tokens_G1 = real_GN.sum(1, keepdim=True)
    log_total_GN = logits_GNE[..., 0] - log_probability_GNE[..., 0]
    entropy_GN = -(probability_GNE.detach() * log_probability_GNE.detach()).sum(-1)
    return RouterStats(
        fraction_GE=fraction_GE,
        probability_GE=(probability_GNE * real_GN.unsqueeze(-1)).sum(1) / tokens_G1.clamp(min=1),
        tokens_G=tokens_G1.squeeze(1).float(),
        z_sum=(log_total_GN.square() * real_GN).sum(),
        load_E=load_GE.sum(0).float(),
        dropped=(real_GN & ~placed_GN).sum().float(),
        entropy=(entropy_GN * real_GN).sum(),
        confidence=(probability_GNE.detach().amax(-1) * real_GN).sum(),
    )


def choice_fraction(expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
    """float32 [G, E]: each expert's share of the real tokens' choices."""
    chosen_GA = expert_GNK.masked_fill(~real_GN.unsqueeze(-1), num_experts).flatten(1)
    choices_G1 = real_GN.sum(1, keepdim=True) * expert_GNK.shape[-1]
    return count_per_group(chosen_GA, num_experts + 1)[:, :-1] / choices_G1.clamp(min=1)


def count_per_group(index_GA: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [G, size]: how often each index occurs in each group."""
    return index_GA.new_zeros(len(index_GA), size).scatter_add_(1, index_GA, torch.ones_like(index_GA))
