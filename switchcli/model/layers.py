"""The plain layers of T5: RMS norm and the dense feed-forward. T5 has no biases.

Legend: B batch, S positions, D model, F hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.axis import SINGLE_PROCESS, ModelAxis, local_slice
from switchcli.model.config import ModelSpec


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dim, without centering and bias."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.epsilon = epsilon

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_BSD, self.weight.shape, self.weight, self.epsilon)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's dtype where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(num_inputs: int, num_outputs: int) -> nn.Linear:
    """Return a linear layer without bias; its weight is [outputs, inputs]."""
    return nn.Linear(num_inputs, num_outputs, bias=False)


def dropout(
    x: torch.Tensor, rate: float, training: bool, shared: int = -2, axis: ModelAxis = SINGLE_PROCESS, divided: int = -1
) -> torch.Tensor:
    """Apply T5's dropout: all positions share one mask, which is drawn from torch's generator.

    A shared mask is small to draw and to save; drawing is the slow part on a CPU.

    Args:
        x: the tensor to drop entries of.
        rate: the fraction of entries that are dropped.
        training: whether to drop at all.
        shared: the dim of the positions.
        axis: the processes among which dim `divided` is divided. Each draws the mask of all slices and uses its own
            slice of it, so that the mask does not depend on their number.
        divided: the dim of which this process has a slice.
    """
    if not training or rate == 0.0:
        return x
    mask_shape = list(x.shape)
    mask_shape[shared] = 1
    mask_shape[divided] *= axis.size
    # Dropout of ones gives 0 or 1 / (1 - rate).
    return x * local_slice(F.dropout(x.new_ones(mask_shape), rate), axis, divided)


class FeedForward(nn.Module):
    """The dense feed-forward: two projections with an activation in between, or three for GEGLU (T5 1.1)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.wi = linear(spec.d_model, spec.d_ff)
        self.wi_gate = linear(spec.d_model, spec.d_ff) if spec.activation == "geglu" else None
        self.wo = linear(spec.d_ff, spec.d_model)
        self.dropout = spec.dropout
        self.axis = SINGLE_PROCESS
        """The processes among which the hidden units are divided."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_BSD = self.axis.enter_region(x_BSD)
        gate = None if self.wi_gate is None else self.wi_gate(x_BSD)
        hidden_BSF = dropout(activate(self.wi(x_BSD), gate), self.dropout, self.training, axis=self.axis)
        return self.axis.all_reduce(self.wo(hidden_BSF))


def activate(hidden: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Return ReLU(hidden), or GELU(gate) * hidden with the tanh approximation of GELU, as in T5 1.1."""
    return F.relu(hidden) if gate is None else F.gelu(gate, approximate="tanh") * hidden
