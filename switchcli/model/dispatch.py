"""Dispatch and combine: tokens to the experts' slots and back, by index (Appendix F does it with one-hot products).

Legend: G groups, N tokens a group, E experts, C slots an expert, D model, O outputs.

`Local` keeps all experts in this process. Another dispatcher may put a collective in between: the layer does not know.
"""

import torch
import torch.nn.functional as F

from switchcli.model.routing import Routing


class Local:
    """The way there and back when every expert is here."""

    def send(self, x_GND: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Gather the token of each slot: [E, G * C, D], zero where the slot is empty."""
        rows = F.pad(x_GND, (0, 0, 0, 1)).flatten(0, 1)
        row_EGC = _row_of_slot(routing, x_GND)
        return rows.index_select(0, row_EGC.flatten()).view(len(row_EGC), -1, rows.shape[-1])

    def receive(self, y_ESO: torch.Tensor, routing: Routing, x_GND: torch.Tensor) -> torch.Tensor:
        """Add each slot's output times its weight to its token: [G, N, O]; a token in no slot stays exactly zero."""
        (G, N, _), width = x_GND.shape, y_ESO.shape[-1]
        weight_EGC = routing.weight_GEC.transpose(0, 1)
        weighted = y_ESO.view(*weight_EGC.shape, width) * weight_EGC.unsqueeze(-1).to(y_ESO.dtype)
        rows = weighted.new_zeros(G * (N + 1), width)
        rows = rows.index_add(0, _row_of_slot(routing, x_GND).flatten(), weighted.flatten(0, 2))
        return rows.view(G, N + 1, width)[:, :N]


def _row_of_slot(routing: Routing, x_GND: torch.Tensor) -> torch.Tensor:
    """[E, G, C]: the row of each slot's token, all groups end to end, each followed by a row for its empty slots."""
    G, N, _D = x_GND.shape
    start_G11 = torch.arange(G, device=x_GND.device).view(G, 1, 1) * (N + 1)
    return (routing.token_GEC + start_G11).transpose(0, 1)
