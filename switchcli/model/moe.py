"""The Switch layer: a router, E experts, and the way between them (paper section 2).

Legend: B batch, S positions, G groups, N tokens a group, E experts, C slots an expert, D model.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.dispatch import Local
from switchcli.model.experts import Experts
from switchcli.model.routing import RoutingReport
from switchcli.model.spec import ModelSpec


class Router(nn.Module):
    """h(x) = W x, no bias, in float32 whatever the precision around it (selective precision, section 2.4)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.d_model))
        self.jitter = spec.router.jitter

    def forward(self, x_GND: torch.Tensor) -> torch.Tensor:
        """Logits_GNE in float32. The jitter falls on this copy alone: the experts see the clean input."""
        # Casting is not enough: under autocast a product of float32 tensors still runs in bfloat16.
        with torch.autocast(x_GND.device.type, enabled=False):
            x_GND = x_GND.float()
            if self.training and self.jitter:
                x_GND = x_GND * torch.empty_like(x_GND).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            return F.linear(x_GND, self.weight.float())


class SwitchOutput(NamedTuple):
    """What the layer gives back: the tokens' outputs and the report that carries its losses."""

    y_BSD: torch.Tensor
    report: RoutingReport


class SwitchFeedForward(nn.Module):
    """The feed-forward of a sparse block: y = p_i(x) E_i(x) for the chosen expert i, zero for a dropped token."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec.router
        self.router = Router(spec)
        self.experts = Experts(spec, spec.d_model)
        self.dispatcher = Local()

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> SwitchOutput:
        """`real_BS` is False for padding. B must be a multiple of the spec's `group_sequences`."""
        B, S, D = x_BSD.shape
        x_GND = x_BSD.reshape(B // self.spec.group_sequences, -1, D)
        routing = self.spec.assign(self.router(x_GND), real_BS.reshape(x_GND.shape[:2]), self.training)
        y_ESD = self.experts(self.dispatcher.send(x_GND, routing))
        y_GND = self.dispatcher.receive(y_ESD, routing, x_GND)
        return SwitchOutput(y_GND.reshape(B, S, D), routing.report)
