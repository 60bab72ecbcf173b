"""E feed-forwards as stacked weights, run together.

Legend: E experts, S slots of an expert (all groups' together), D model, F hidden, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.layers import activate
from switchcli.model.spec import ModelSpec


class Experts(nn.Module):
    """E feed-forwards as stacked weights: slice e is the `nn.Linear` weight [outputs, inputs] of expert e."""

    def __init__(self, spec: ModelSpec, num_outputs: int) -> None:
        super().__init__()
        E, D, hidden = spec.num_experts, spec.d_model, spec.d_ff
        self.wi = nn.Parameter(torch.empty(E, hidden, D))
        self.wi_gate = nn.Parameter(torch.empty(E, hidden, D)) if spec.activation == "geglu" else None
        self.wo = nn.Parameter(torch.empty(E, num_outputs, hidden))
        self.dropout = spec.experts_dropout

    def forward(self, x_ESD: torch.Tensor) -> torch.Tensor:
        """[E, S, O]. Every expert runs, with no token too, so all have gradients."""
        gate = None if self.wi_gate is None else x_ESD @ self.wi_gate.mT
        hidden_ESF = F.dropout(activate(x_ESD @ self.wi.mT, gate), self.dropout, self.training)
        return hidden_ESF @ self.wo.mT
