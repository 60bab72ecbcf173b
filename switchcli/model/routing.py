"""Routing: which token sits in each expert's slot, and with what weight (paper section 2.1 and 2.2, Appendix F).

Legend: G groups, N tokens a group, E experts, C slots an expert (the capacity).

A router is a spec with a pure `assign`. Its answer is slot-major, so that any router shares one dispatch and combine.
A group is a fixed number of whole sequences, so what is dropped does not depend on microbatches or ranks.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from switchcli.spec import Spec


class RoutingReport(NamedTuple):
    """What one sparse layer did in one forward pass; float32 tensors, only `balance` carries a gradient."""

    balance: torch.Tensor
    """alpha * E * sum_i f_i P_i (eq. 4), averaged over groups; alpha when routing is uniform."""
    load_E: torch.Tensor
    """Real tokens that chose each expert, before the capacity cut any."""
    dropped: torch.Tensor
    """Real tokens that found no slot."""
    tokens: torch.Tensor
    """Real tokens: padding is not routed."""


class Routing(NamedTuple):
    """The assignment of tokens to slots."""

    token_GEC: torch.Tensor
    """int64: the token in each slot, as its index in the group; N where the slot is empty."""
    weight_GEC: torch.Tensor
    """float32: p_i(x) of the token in the slot (eq. 2), 0 where it is empty; differentiable."""
    report: RoutingReport


class Switch(Spec):
    """Top-1 routing: each token to its most probable expert, weighted by that raw probability (section 2.1).

    The weight is not renormalised: over one expert that gives 1, and no gradient to the router.
    """

    kind: Literal["switch"] = "switch"
    capacity_factor: float = Field(default=1.25, gt=0.0)
    """Slots for training, as a multiple of an even share (eq. 3)."""
    eval_capacity_factor: float = Field(default=2.0, gt=0.0)
    """The same for evaluation and generation; 2.0 is Mesh-TensorFlow's default, the paper has none."""
    min_capacity: int = Field(default=4, ge=1)
    group_sequences: int = Field(default=1, ge=1)
    """Sequences that share a capacity; tokens queue in their order, earlier ones first."""
    jitter: float = Field(default=0.01, ge=0.0, lt=1.0)
    """The router's copy of its input is multiplied by U[1 - jitter, 1 + jitter] in training (Appendix C)."""
    balance_loss_coef: float = Field(default=0.01, ge=0.0)
    """alpha of eq. 4. The layers' losses are summed, as in Mesh-TensorFlow."""

    def capacity(self, num_tokens: int, num_experts: int, training: bool) -> int:
        """Slots C of each expert in a group of N tokens (eq. 3), rounded down, at least `min_capacity`, at most N."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        return min(num_tokens, max(self.min_capacity, int(num_tokens * factor / num_experts)))

    def assign(self, logits_GNE: torch.Tensor, real_GN: torch.Tensor, training: bool) -> Routing:
        """Queue the real tokens of each group at their first choices, in order, and cut each queue at the capacity.

        Args:
            logits_GNE: the router's output h(x), float32.
            real_GN: bool, False for padding, which joins no queue and counts in no mean.
            training: which capacity factor holds.
        """
        G, N, E = logits_GNE.shape
        probability_GNE = logits_GNE.softmax(-1)
        gate_GN, expert_GN = probability_GNE.max(-1)

        # A stable sort by expert lays the queues end to end, each in the order of its tokens; padding comes last.
        queue_GN = expert_GN.masked_fill(~real_GN, E)
        load_GE = torch.zeros(G, E + 1, dtype=torch.int64, device=queue_GN.device)
        load_GE = load_GE.scatter_add_(1, queue_GN, torch.ones_like(queue_GN))[:, :E]
        order_GN = queue_GN.argsort(dim=1, stable=True)
        slot_C = torch.arange(self.capacity(N, E, training), device=queue_GN.device)
        place_GEC = (load_GE.cumsum(1) - load_GE).unsqueeze(-1) + slot_C
        token_GEC = order_GN.gather(1, place_GEC.clamp_(max=N - 1).flatten(1)).view_as(place_GEC)
        token_GEC = token_GEC.masked_fill(slot_C >= load_GE.unsqueeze(-1), N)

        weight_GEC = F.pad(gate_GN, (0, 1)).gather(1, token_GEC.flatten(1)).view_as(token_GEC)
        return Routing(token_GEC, weight_GEC, self._report(probability_GNE, real_GN, load_GE, len(slot_C)))

    def _report(
        self, probability_GNE: torch.Tensor, real_GN: torch.Tensor, load_GE: torch.Tensor, capacity: int
    ) -> RoutingReport:
        tokens_G1 = real_GN.sum(1, keepdim=True).clamp(min=1)
        fraction_GE = load_GE / tokens_G1  # f, eq. 5: counted before the cut, no gradient
        mean_GE = (probability_GNE * real_GN.unsqueeze(-1)).sum(1) / tokens_G1  # P, eq. 6
        balance = self.balance_loss_coef * load_GE.shape[1] * (fraction_GE * mean_GE).sum(1).mean()
        return RoutingReport(
            balance=balance,
            load_E=load_GE.sum(0).float(),
            dropped=(load_GE - capacity).clamp(min=0).sum().float(),
            tokens=real_GN.sum().float(),
        )


RouterSpec = Switch
"""The routers that a recipe can name by `kind`: a union, as soon as there are two."""
