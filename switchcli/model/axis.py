"""The interface of a layer to the other processes that divide the heads, d_ff and the vocabulary with it.

Paper section 5, model parallelism: a tensor that all processes have enters a divided region, and their partial results
are summed when they leave it. `SingleProcess` is for a process that holds everything; another axis may use collectives.
"""

from typing import Protocol

import torch


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
