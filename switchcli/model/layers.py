"""The plain layers of T5: RMS norm and the dense feed-forward; T5 has no biases.

Legend: B batch, S positions, D model, F hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.axis import SINGLE_PROCESS, ModelAxis, local_slice
from switchcli.model.config import ModelSpec


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dim; no mean is taken off, no bias added."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.epsilon = epsilon

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, self.epsilon)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What products with x are computed in: autocast's type, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    """A product without bias, weight [outputs, inputs]."""
    return nn.Linear(num_inputs, num_outputs, bias=False)


def dropout(
    x: torch.Tensor, rate: float, training: bool, shared: int = -2, axis: ModelAxis = SINGLE_PROCESS, divided: int = -1
) -> torch.Tensor:
    """T5's dropout: one mask for all positions, which lie along dim `shared`, drawn from torch's generator.

    So only a thin mask is drawn and kept: on a CPU to draw is what costs. Each process of `axis`, which holds its part
    of dim `divided`, draws the mask of all parts: it does not depend on their number.
    """
    if not training or rate == 0.0:
        return x
    mask_shape = list(x.shape)
    mask_shape[shared] = 1
    mask_shape[divided] *= axis.size
    return x * local_slice(F.dropout(x.new_ones(mask_shape), rate), axis, divided)


class FeedForward(nn.Module):
    """Two products with an activation between them; three for GEGLU (T5 1.1)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.wi = linear(spec.d_model, spec.d_ff)
        self.wi_gate = linear(spec.d_model, spec.d_ff) if spec.activation == "geglu" else None
        self.wo = linear(spec.d_ff, spec.d_model)
        self.dropout = spec.dropout
        self.axis = SINGLE_PROCESS

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_BSD = self.axis.enter_region(x_BSD)
        gate = None if self.wi_gate is None else self.wi_gate(x_BSD)
        hidden_BSF = dropout(activate(self.wi(x_BSD), gate), self.dropout, self.training, axis=self.axis)
        return self.axis.all_reduce(self.wo(hidden_BSF))


def activate(hidden: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """ReLU(hidden); with a gate GELU(gate) * hidden, GELU by its tanh approximation, as T5 1.1 has it."""
    return F.relu(hidden) if gate is None else F.gelu(gate, approximate="tanh") * hidden
