"""The Switch layer: a router, E experts, and the way between them (paper section 2).

Legend: B batch, S positions, G groups, N tokens a group, E experts, D model, O outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.config import ModelSpec, Stack
from switchcli.model.moe.dispatch import Dispatcher, LocalDispatcher
from switchcli.model.moe.experts import Experts
from switchcli.model.moe.router import Mode, Policy
from switchcli.model.moe.stats import RouterStats


class RouterWeights(nn.Module):
    """h(x) = W x, no bias, in float32 whatever the precision around it (selective precision, section 2.4)."""

    def __init__(self, spec: ModelSpec, stack: Stack) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.d_model))
        self.rule = spec.router_of(stack)
        self.dtype = torch.float32
        """bfloat16 in the paper's other arm (Table 2)."""

    def forward(self, x_GND: torch.Tensor) -> torch.Tensor:
        """Logits_GNE. Jitter and dropout fall on this copy alone: the experts see the clean input (Appendix C)."""
        # Casting is not enough: under autocast a product of float32 tensors still runs in bfloat16.
        with torch.autocast(x_GND.device.type, enabled=False):
            x_GND = x_GND.to(self.dtype)
            if self.training and self.rule.jitter:
                x_GND = x_GND * jitter(x_GND, self.rule.jitter)
            x_GND = F.dropout(x_GND, self.rule.input_dropout, self.training)
            return F.linear(x_GND, self.weight.to(self.dtype))


def jitter(x: torch.Tensor, width: float) -> torch.Tensor:
    """Like x, uniform on [1 - width, 1 + width) in 2**16 steps: a draw is what costs on a CPU, and one makes four."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    steps = draws.view(torch.int16)[: x.numel()].view(x.shape)
    return steps.to(x.dtype).mul_(width * 2.0**-15).add_(1.0)


class SwitchOutput(NamedTuple):
    """What the layer gives back: the tokens' outputs and the report that carries its losses."""

    y_BSO: torch.Tensor
    stats: RouterStats


class SwitchLayer(nn.Module):
    """y = sum of p_i(x) E_i(x) over the experts i in whose slots x sits (eq. 2), zero for a dropped token."""

    def __init__(self, spec: ModelSpec, stack: Stack, num_outputs: int) -> None:
        super().__init__()
        self.rule = spec.router_of(stack)
        self.router = RouterWeights(spec, stack)
        self.experts = Experts(spec, num_outputs)
        self.dispatcher: Dispatcher[Any] = LocalDispatcher()
        self.policy: Policy = "paper"

    @property
    def mode(self) -> Mode:
        return "training" if self.training else self.policy

    def forward(self, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> SwitchOutput:
        """`real_BS` is False for padding. B must be a multiple of the sequences that the router takes `together`."""
        axis = self.experts.axis
        B, S, D = x_BSD.shape
        x_GND = x_BSD.reshape(B // self.rule.group_size(self.mode), -1, D)
        with torch.autocast(x_BSD.device.type, enabled=False):  # which would choose a precision for the softmax
            routing = self.rule.assign(self.router(x_GND), real_BS.reshape(x_GND.shape[:2]), self.mode)
            routing = routing._replace(weight_GEC=axis.enter_region(routing.weight_GEC))
        x_AD, sent = self.dispatcher.dispatch(axis.enter_region(x_GND), routing, self.training)
        mask_BF = self.experts.draw_dropout_mask(x_AD, B)
        mask_AF = None if mask_BF is None else self.dispatcher.expand_mask(mask_BF, sent, S)
        y_AO = self.experts(x_AD, sent.end_E, mask_AF)
        y_GNO = axis.all_reduce(self.dispatcher.combine(y_AO, sent, x_GND))
        return SwitchOutput(y_GNO.reshape(B, S, -1), routing.stats)


def sparse_layers(model: nn.Module) -> dict[str, SwitchLayer]:
    """The sparse layers by their names in `ModelSpec.routed_parts`, in the order of the reports."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, SwitchLayer))
    return {name.removesuffix(".switch"): layer for name, layer in found}


def local_experts(model: nn.Module) -> range:
    """The numbers of the experts whose weights `model` holds: the same ones in every sparse layer."""
    return next((module.expert_ids for module in model.modules() if isinstance(module, Experts)), range(1))


@contextmanager
def evaluating(model: nn.Module, policy: Policy) -> Iterator[None]:
    """Within, `model` is in evaluation mode and its sparse layers count capacity by `policy`; then as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    policies = [(module, module.policy) for module in model.modules() if isinstance(module, SwitchLayer)]
    evaluate_by(model, policy)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, before in policies:
            layer.policy = before


def evaluate_by(model: nn.Module, policy: Policy) -> None:
    """Put `model` into evaluation mode, its sparse layers counting capacity by `policy`."""
    model.eval()
    for module in model.modules():
        if isinstance(module, SwitchLayer):
            module.policy = policy
