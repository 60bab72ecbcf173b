"""The search for slots of routers in which tokens choose: which choice of which token gets which slot of its expert.

Legend: G groups, N tokens per group, E experts, C slots per expert (the capacity), K choices per token.
A = K * N choices per group: column k * N + n is choice k of token n.
S = E * C + 1 slots per group: column e * C + c is slot c of expert e. The last one collects the choices without a slot.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.moe.stats import count_per_group


class FoundSlots(NamedTuple):
    """The slot of each choice, and what the search counted."""

    slot_GA: torch.Tensor
    """int64: the slot of each choice, expert * C + position; E * C for a choice without one."""
    load_GE: torch.Tensor
    """int64: the tokens that queued for each expert, including those beyond the capacity."""
    assigned_GN: torch.Tensor
    """bool: the tokens that have a slot."""


def search_slots(
    expert_GNK: torch.Tensor,
    real_GN: torch.Tensor,
    order_GN: torch.Tensor | None,
    eligible: Callable[[int, torch.Tensor], torch.Tensor],
    num_experts: int,
    capacity: int,
) -> FoundSlots:
    """Queue all first choices, then all second ones behind them, and so on, and give each queue its expert's slots.

    Args:
        expert_GNK: int64, the experts that each token chooses, the first choice first.
        real_GN: bool, False for padding, which queues for no expert.
        order_GN: int64, the tokens of each group in the order in which they queue; None: by position.
        eligible: given the number of a choice after the first and `assigned_GN` so far, returns which tokens queue for
            it, bool [G, N].
        num_experts: E.
        capacity: C.
    """
    (G, _, K), E, C = expert_GNK.shape, num_experts, capacity
    # Tokens that have queued so far, including tokens beyond the capacity.
    load_GE = torch.zeros(G, E, dtype=torch.int64, device=expert_GNK.device)
    assigned_GN = torch.zeros_like(real_GN)  # tokens that have a slot
    slots = []
    for choice in range(K):
        eligible_GN = real_GN
        if choice > 0:
            eligible_GN = real_GN & eligible(choice, assigned_GN)
        queue_GN = expert_GNK[..., choice].masked_fill(~eligible_GN, E)  # E: in no queue
        position_GN, queued_GE = _positions_in_expert(queue_GN, load_GE, order_GN)
        fits_GN = eligible_GN & (position_GN < C)
        # Slot number expert * C + position, or E * C for a choice without a slot.
        slots.append((queue_GN * C + position_GN).where(fits_GN, E * C))
        assigned_GN = assigned_GN | fits_GN
        load_GE = load_GE + queued_GE
    return FoundSlots(torch.cat(slots, dim=1), load_GE, assigned_GN)


def fill_slots(
    slot_GA: torch.Tensor, gate_GNK: torch.Tensor, num_experts: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token in each slot, int64 [G, E, C] with N for an empty one, and its weight [G, E, C], 0 if empty."""
    (G, N, K), E, C = gate_GNK.shape, num_experts, capacity
    token_A = torch.arange(N, device=slot_GA.device).repeat(K)
    # Invert "slot of each choice" into "token of each slot". No slot is written twice, except the last one, which is
    # cut off below. Empty slots keep token N and weight 0.
    token_GS = slot_GA.new_full((G, E * C + 1), N).scatter_(1, slot_GA, token_A.expand(G, -1))
    weight_GA = gate_GNK.transpose(1, 2).flatten(1)  # in the column order of slot_GA
    weight_GS = gate_GNK.new_zeros(G, E * C + 1).scatter(1, slot_GA, weight_GA)
    return token_GS[:, :-1].view(G, E, C), weight_GS[:, :-1].view(G, E, C)


def _positions_in_expert(
    queue_GN: torch.Tensor, load_GE: torch.Tensor, order_GN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's place among its expert's slots and queue, int64 [G, N], and the queue lengths, int64 [G, E].

    Positions count from the first slot of the expert, behind the tokens of earlier choices. They may exceed the
    capacity. The position of a token that is in no queue means nothing.

    Args:
        queue_GN: int64, the expert for which a token queues; E for none.
        load_GE: int64, the tokens that have queued for each expert by earlier choices.
        order_GN: int64, the tokens of each group in the order in which they queue; None: by position.
    """
    E = load_GE.shape[1]
    if order_GN is not None:
        queue_GN = queue_GN.gather(1, order_GN)  # column i is now the i-th token to queue, not token i
    length_GX = count_per_group(queue_GN, E + 1)  # X: the E queues, and the tokens in none of them
    # A stable sort by queue puts the queues end to end, and keeps the order within each.
    queue_GN, token_GN = queue_GN.sort(dim=1, stable=True)
    # The token at index i of the sorted row is number i - start in its queue, where start is the length of all queues
    # before it, and sits behind `load` tokens of earlier choices: position = i - start + load.
    start_GX = length_GX.cumsum(1) - length_GX
    shift_GX = F.pad(load_GE, (0, 1)) - start_GX
    position_GN = torch.arange(queue_GN.shape[1], device=queue_GN.device) + shift_GX.gather(1, queue_GN)
    if order_GN is not None:
        token_GN = order_GN.gather(1, token_GN)  # from the number in the queueing order back to the token's index
    # Undo the sort: position_GN[g, i] belongs to token token_GN[g, i]. Each token occurs once, so all are written.
    return torch.empty_like(position_GN).scatter_(1, token_GN, position_GN), length_GX[:, :E]
