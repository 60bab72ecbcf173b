"""Router statistics: what the losses of a sparse layer need, and the health of its routing.

Legend: G groups, N tokens per group, E experts, K choices per token, A = K * N choices per group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class RouterStats(NamedTuple):
    """Statistics of one sparse layer in one forward pass. `probability_GE` and `z_sum` carry gradients."""

    fraction_GE: torch.Tensor
    """f of eq. 5: the fraction of the real tokens' choices that go to each expert, before capacity drops any.

    By default only first choices count; see `TokenChoiceRouter._fraction`."""
    probability_GE: torch.Tensor
    """P of eq. 6: the mean probability of each expert over real tokens."""
    tokens_G: torch.Tensor
    """float32: number of real tokens of each group. Padding is not routed."""
    z_sum: torch.Tensor
    """float32 scalar: sum over real tokens of logsumexp(h)**2, the router z-loss (ST-MoE, beyond the paper)."""
    load_E: torch.Tensor
    """float32: number of tokens that queued for each expert, including those beyond the capacity. For expert choice,
    its filled slots.

    Choices do not queue if top-k routing skips them (`keep_threshold`), or if the token has a slot already and the
    router gives it only one (`no_token_left_behind`)."""
    choice_E: torch.Tensor
    """float32: number of choices of each expert by real tokens, all k of a token, whether they queued or not; `load_E`
    where no biases need them."""
    dropped: torch.Tensor
    """float32 scalar: number of real tokens in no slot."""
    dropped_choices: torch.Tensor
    """float32 scalar: number of choices that queued (`load_E`) and found no slot; a token has several with k > 1."""
    entropy: torch.Tensor
    """float32 scalar: sum over real tokens of the entropy of p(x), in nats; at most tokens * log(E)."""
    confidence: torch.Tensor
    """float32 scalar: sum over real tokens of the largest p_i(x)."""

    @property
    def tokens(self) -> torch.Tensor:
        """float32 scalar: number of real tokens of all groups."""
        return self.tokens_G.sum()

    @property
    def load_balancing_sum(self) -> torch.Tensor:
        """float32 scalar: E * sum_i f_i P_i (eq. 4 without alpha) times the real tokens of a group, summed over groups.

        It is a sum over tokens, as the cross-entropy is. Divided by the real tokens of all microbatches and ranks it
        depends on neither, and a group of two tokens counts as two.
        """
        balance_G = self.probability_GE.shape[1] * (self.fraction_GE * self.probability_GE).sum(1)
        return (balance_G * self.tokens_G).sum()

    @property
    def load_balancing_loss(self) -> torch.Tensor:
        """float32 scalar: `load_balancing_sum` per real token; 1 when routing is uniform, 0 without tokens."""
        return self.load_balancing_sum / self.tokens.clamp(min=1)

    @property
    def z_loss(self) -> torch.Tensor:
        """float32 scalar: `z_sum` per real token."""
        return self.z_sum / self.tokens.clamp(min=1)


StackStats = tuple[RouterStats, ...]
"""The statistics of each sparse layer of a stack, in the order of the forward pass."""


def router_stats(
    logits_GNE: torch.Tensor,
    real_GN: torch.Tensor,
    fraction_GE: torch.Tensor,
    load_GE: torch.Tensor,
    assigned_GN: torch.Tensor,
    num_filled: torch.Tensor | None = None,
    choice_E: torch.Tensor | None = None,
    log_gate_GNE: torch.Tensor | None = None,
) -> RouterStats:
    """Return the statistics of one assignment.

    Args:
        logits_GNE: the router's output.
        real_GN: bool, False for padding.
        fraction_GE: f of eq. 5, see `RouterStats`.
        load_GE: `RouterStats.load_E` of each group.
        assigned_GN: bool, tokens that are in a slot.
        num_filled: integer scalar, the filled slots; None where each choice that queues has one.
        choice_E: see `RouterStats`; None where every choice queues.
        log_gate_GNE: logarithms of gates that do not add up to 1 over the experts. Probabilities are their shares.
    """
    log_probability_GNE = log_softmax_over_experts(logits_GNE.float() if log_gate_GNE is None else log_gate_GNE)
    probability_GNE = log_probability_GNE.exp()
    tokens_G1 = real_GN.sum(1, keepdim=True)
    # log p_i = h_i - logsumexp(h), so any one expert gives the logsumexp.
    if log_gate_GNE is None:
        logsumexp_GN = logits_GNE[..., 0] - log_probability_GNE[..., 0]
    else:
        logsumexp_GN = logits_GNE.float().logsumexp(-1)
    load_E = load_GE.sum(0).float()
    entropy_GN = -(probability_GNE.detach() * log_probability_GNE.detach()).sum(-1)
    return RouterStats(
        fraction_GE=fraction_GE,
        probability_GE=(probability_GNE * real_GN.unsqueeze(-1)).sum(1) / tokens_G1.clamp(min=1),
        tokens_G=tokens_G1.squeeze(1).float(),
        z_sum=(logsumexp_GN.square() * real_GN).sum(),
        load_E=load_E,
        choice_E=load_E if choice_E is None else choice_E.float(),
        dropped=(real_GN & ~assigned_GN).sum().float(),
        dropped_choices=load_E.new_zeros(()) if num_filled is None else load_E.sum() - num_filled,
        entropy=(entropy_GN * real_GN).sum(),
        confidence=(probability_GNE.detach().amax(-1) * real_GN).sum(),
    )


def softmax_over_experts(logits_GNE: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last dim. The result may be a transposed view."""
    if _has_short_rows(logits_GNE):
        return logits_GNE.mT.contiguous().softmax(-2).mT  # over E of [G, E, N]
    return logits_GNE.softmax(-1)


def log_softmax_over_experts(logits_GNE: torch.Tensor) -> torch.Tensor:
    """Return the log softmax over the last dim. The result may be a transposed view."""
    if _has_short_rows(logits_GNE):
        return logits_GNE.mT.contiguous().log_softmax(-2).mT
    return logits_GNE.log_softmax(-1)


def _has_short_rows(logits_GNE: torch.Tensor) -> bool:
    """Return whether a row of E numbers leaves the vectors of a CPU, of up to 16 float32 numbers, partly unused.

    torch vectorizes a softmax over the last dim of memory. With few experts that dim must be the tokens.
    """
    return logits_GNE.is_cpu and logits_GNE.shape[-1] < 16


def choice_fraction(expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the fraction of the real tokens' choices that go to each expert: float32 [G, E]; 0 without real tokens."""
    num_choices_G1 = real_GN.sum(1, keepdim=True) * expert_GNK.shape[-1]
    return choice_counts(expert_GNK, real_GN, num_experts) / num_choices_G1.clamp(min=1)


def choice_counts(expert_GNK: torch.Tensor, real_GN: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how many choices of the real tokens go to each expert: int64 [G, E]."""
    # Padding counts for an expert number E, which is cut off.
    expert_GA = expert_GNK.masked_fill(~real_GN.unsqueeze(-1), num_experts).flatten(1)
    return count_per_group(expert_GA, num_experts + 1)[:, :-1]


def count_per_group(index_GA: torch.Tensor, size: int) -> torch.Tensor:
    """Return how often each index from 0 to size - 1 occurs in each group: int64 [G, size]."""
    return index_GA.new_zeros(len(index_GA), size).scatter_add_(1, index_GA, index_GA.new_ones(index_GA.shape))
