"""What a layer asks of the other processes when each holds a part of the heads, of d_ff and of the vocabulary.

Paper section 5, model parallelism: what all processes have enters a divided part, and what they make of it in parts is
summed when it leaves. `SingleProcess` is one process that holds all; another axis may put collectives in between.
"""

from typing import Protocol

import torch


class ModelAxis(Protocol):
    """The processes among which heads, hidden units and the vocabulary are divided; all else each of them has."""

    rank: int
    """The number of this process's part."""
    size: int
    """Parts."""

    def enter_region(self, x: torch.Tensor) -> torch.Tensor:
        """x itself, alike in all processes, of which each uses it in its part: the gradient is the sum of theirs."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' x; its gradient goes to each of them."""

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of all processes' x, element by element; without a gradient."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """All processes' x along the last dim, in the order of the parts; without a gradient."""


class SingleProcess:
    """All is here."""

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
    """This process's part of x, which has all of them along `dim`."""
    length = x.shape[dim] // axis.size
    return x.narrow(dim, axis.rank * length, length)
