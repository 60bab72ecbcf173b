"""What a layer asks of the other processes when each holds a part of the heads, of d_ff and of the vocabulary.

Paper section 5, model parallelism: what all processes have enters a divided part, and what they make of it in parts is
summed when it leaves. `Undivided` is one process that holds all; another axis may put collectives in between.
"""

from typing import Protocol

import torch


class Axis(Protocol):
    """The processes among which heads, hidden units and the vocabulary are divided; all else each of them has."""

    place: int
    """The number of this process's part."""
    size: int
    """Parts."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x itself, alike in all processes, of which each uses it in its part: the gradient is the sum of theirs."""

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all processes' x; its gradient goes to each of them."""

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of all processes' x, element by element; without a gradient."""

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        """All processes' x along the last dim, in the order of the parts; without a gradient."""


class Undivided:
    """All is here."""

    place = 0
    size = 1

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        return x


UNDIVIDED: Axis = Undivided()


def part_of(x: torch.Tensor, axis: Axis, dim: int) -> torch.Tensor:
    """This process's part of x, which has all of them along `dim`."""
    length = x.shape[dim] // axis.size
    return x.narrow(dim, axis.place * length, length)
