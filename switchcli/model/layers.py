"""The plain layers of T5: RMS norm and the dense feed-forward. T5 has no biases.

`ModelAxis` is the interface of a layer to the other processes that divide the heads, d_ff and the vocabulary with it
(paper section 5, model parallelism): a tensor that all processes have enters a divided region, and their partial
results are summed when they leave it. `SingleProcess` is for a process that holds everything.

Legend: B batch, S positions, D model, F hidden.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from switchcli.model.config import ModelSpec
from switchcli.model.kernels import cpu_products
from switchcli.model.kernels.norm import rms_norm


class ModelAxis(Protocol):
    """The processes among which heads, hidden units and the vocabulary are divided. Each has all other weights."""

    rank: int
    """The index of this process, and of its slices."""
    size: int
    """The number of processes."""

    def enter_region(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, which is equal in all processes, for use with this process's slices. Gradients are summed."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of x over all processes. Each process's x gets the gradient of the sum."""

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """Return the elementwise maximum of x over all processes, without a gradient."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return x of all processes, concatenated along the last dim in rank order, without a gradient."""


class SingleProcess:
    """A model axis of one process."""

    rank = 0
    size = 1

    def enter_region(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x


SINGLE_PROCESS: ModelAxis = SingleProcess()


def local_slice(x: torch.Tensor, axis: ModelAxis, dim: int) -> torch.Tensor:
    """Return this process's slice of x along `dim`, where x has the slices of all processes."""
    length = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * length, length)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dim, without centering and bias."""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.epsilon = epsilon

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_BSD, self.weight, self.epsilon)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's dtype where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Linear(nn.Linear):
    """A linear layer without bias; its weight is [outputs, inputs]."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cpu_products.linear(x, self.weight)


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
    return x * _dropout_mask(x, rate, shared, axis, divided)


def add_dropout(x_BSD: torch.Tensor, y_BSD: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Return x + dropout(y), [B, S, D], the end of every sublayer, in one pass over memory.

    The result has the dtype of x; in bfloat16 the product of y and its mask is added unrounded.
    """
    if not training or rate == 0.0:
        return x_BSD + y_BSD
    return torch.addcmul(x_BSD, y_BSD, _dropout_mask(y_BSD, rate))


def _dropout_mask(
    x: torch.Tensor, rate: float, shared: int = -2, axis: ModelAxis = SINGLE_PROCESS, divided: int = -1
) -> torch.Tensor:
    """Draw the factors of `dropout`, which broadcast to x."""
    mask_shape = list(x.shape)
    mask_shape[shared] = 1
    mask_shape[divided] *= axis.size
    # Dropout of ones gives 0 or 1 / (1 - rate).
    return local_slice(F.dropout(x.new_ones(mask_shape), rate), axis, divided)


class FeedForward(nn.Module):
    """The dense feed-forward: two projections with an activation in between, or three for GEGLU (T5 1.1)."""

    def __init__(self, spec: ModelSpec, d_ff: int) -> None:
        super().__init__()
        self.wi = Linear(spec.d_model, d_ff)
        self.wi_gate = Linear(spec.d_model, d_ff) if spec.activation == "geglu" else None
        self.wo = Linear(d_ff, spec.d_model)
        self.dropout = spec.dropout
        self.axis = SINGLE_PROCESS
        """The processes among which the hidden units are divided."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_BSD = self.axis.enter_region(x_BSD)
        gate = None if self.wi_gate is None else self.wi_gate(x_BSD)
        hidden_BSF = dropout(activate(self.wi(x_BSD), gate), self.dropout, self.training, axis=self.axis)
        return self.axis.all_reduce(self.wo(hidden_BSF))


def activate(hidden: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """Return ReLU(hidden), or GELU(gate) * hidden with the tanh approximation of GELU, as in T5 1.1.

    ReLU overwrites `hidden`, which must be the result of a product: no gradient needs it. A forward hook of that
    product sees the result of ReLU.
    """
    return hidden.relu_() if gate is None else F.gelu(gate, approximate="tanh") * hidden
