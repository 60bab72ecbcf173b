"""What a sparse layer tells of its routing: what its losses need, and its health.

Legend: G groups, N tokens a group, E experts, K choices of a token.
"""

from typing import NamedTuple

import torch


class RoutingReport(NamedTuple):
    """What one sparse layer did in one forward pass; `probability_GE` and `z` carry gradients."""

    fraction_GE: torch.Tensor
    """f of eq. 5: the real tokens' choices that fell on each expert, as a share, before the capacity cut any."""
    probability_GE: torch.Tensor
    """P of eq. 6: the mean probability of each expert over real tokens."""
    z: torch.Tensor
    """Mean over a group's real tokens of logsumexp(h)**2, averaged over groups as `balance` is, so that neither depends
    on microbatches or ranks: the router z-loss (ST-MoE, beyond the paper)."""
    load_E: torch.Tensor
    """Choices that fell on each expert, before the capacity cut any: of expert choice, its filled slots."""
    dropped: torch.Tensor
    """Real tokens in no slot."""
    tokens: torch.Tensor
    """Real tokens: padding is not routed."""
    entropy: torch.Tensor
    """Sum over real tokens of the entropy of p(x), in nats: at most tokens * log(E)."""
    confidence: torch.Tensor
    """Sum over real tokens of the largest p_i(x)."""

    @property
    def balance(self) -> torch.Tensor:
        """E * sum_i f_i P_i (eq. 4 without alpha), averaged over groups: 1 when routing is uniform."""
        return self.fraction_GE.shape[1] * (self.fraction_GE * self.probability_GE).sum(1).mean()


Reports = tuple[RoutingReport, ...]
"""One for each sparse layer, in the order of the forward pass."""


def report_of(
    logits_GNE: torch.Tensor,
    real_GN: torch.Tensor,
    fraction_GE: torch.Tensor,
    load_GE: torch.Tensor,
    placed_GN: torch.Tensor,
) -> RoutingReport:
    """The report of one assignment; `placed_GN` says which tokens are in a slot, the others are named as above."""
    log_probability_GNE = logits_GNE.float().log_softmax(-1)
    probability_GNE = log_probability_GNE.exp()
    tokens_G1 = real_GN.sum(1, keepdim=True)
    log_total_GN = logits_GNE[..., 0] - log_probability_GNE[..., 0]
    entropy_GN = -(probability_GNE.detach() * log_probability_GNE.detach()).sum(-1)
    return RoutingReport(
        fraction_GE=fraction_GE,
        probability_GE=(probability_GNE * real_GN.unsqueeze(-1)).sum(1) / tokens_G1.clamp(min=1),
        z=(log_total_GN.square() * real_GN).sum(1).div(tokens_G1.squeeze(1).clamp(min=1)).mean(),
        load_E=load_GE.sum(0).float(),
        dropped=(real_GN & ~placed_GN).sum().float(),
        tokens=tokens_G1.sum().float(),
        entropy=(entropy_GN * real_GN).sum(),
        confidence=(probability_GNE.detach().amax(-1) * real_GN).sum(),
    )


def share(expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
    """float32 [G, E]: each expert's share of the real tokens' choices."""
    chosen_GA = expert_GNK.masked_fill(~real_GN.unsqueeze(-1), num_experts).flatten(1)
    choices_G1 = real_GN.sum(1, keepdim=True) * expert_GNK.shape[-1]
    return count_each(chosen_GA, num_experts + 1)[:, :-1] / choices_G1.clamp(min=1)


def count_each(index_GA: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [G, size]: how often each index occurs in each group."""
    return index_GA.new_zeros(len(index_GA), size).scatter_add_(1, index_GA, torch.ones_like(index_GA))
