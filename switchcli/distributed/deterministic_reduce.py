"""The `ordered` reduction: gradients added up in an order that the number of a step's microbatches decides alone.

A sum of floating-point numbers depends on its order, and with it, where ranks add up what they have first, on their
number. Here the microbatches, 2**k times an odd number of them, are cut into 2**k runs, which autograd adds up one
microbatch after the other; the sums of neighbours are added in pairs, then pairs of pairs, up to the whole. Of a power
of two of ranks each has the part of that tree below one of its nodes, and the upper levels are added between ranks.
Addition commutes: a level has the same bits on either side.
"""

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.mesh import RankGroup


class DeterministicReduce:
    """The tree of a step. Between two steps it holds nothing."""

    def __init__(self, ranks: RankGroup | None) -> None:
        """`ranks` have the other shares of a batch."""
        self._ranks = ranks
        self._sums: list[list[torch.Tensor]] = []
        """Of the step so far: each of more runs than the next, as digits of a binary number."""

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Give all ranks the weights of the first."""
        if self._ranks is not None:
            for parameter in model.parameters():
                dist.broadcast(parameter, group_src=0, group=self._ranks.group)

    @torch.no_grad()
    def add(self, model: nn.Module, position: int, count: int) -> None:
        """Take up the gradient of this rank's microbatch `position` of `count`, counted from 1.

        After the last one every `.grad` is the sum over all microbatches of all ranks.
        """
        if position == 1:
            self._sums.clear()  # of a step that failed
        runs = count & -count
        finished, within = divmod(position, count // runs)
        if within:
            return  # autograd adds the next one to it
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self._sums.append([parameter.grad for parameter in parameters if parameter.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        while finished % 2 == 0:
            torch._foreach_add_(self._sums[-2], self._sums.pop())
            finished //= 2
        if position == count:
            for parameter, gradient in zip(parameters, self._over_ranks(self._sums.pop()), strict=True):
                parameter.grad = gradient

    def _over_ranks(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._ranks is None:
            return gradients
        shapes = [gradient.shape for gradient in gradients]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        gradients.clear()  # their memory is for what others send
        _add_over(flat, self._ranks, 1)
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _add_over(part: torch.Tensor, ranks: RankGroup, distance: int) -> None:
    """Replace `part`, which is each rank's sum of `distance` ranks, by the sum of all of them.

    Two ranks add up a half each, which they do with further ranks too, before they tell each other: what leaves a rank
    is as much as by a ring.
    """
    if distance == ranks.size:
        return
    upper, middle = bool(ranks.rank & distance), len(part) // 2
    halves = part[:middle], part[middle:]
    own, other = halves[upper], halves[not upper]
    theirs = torch.empty_like(own)
    _swap(other, theirs, ranks, distance)
    own.add_(theirs)
    del theirs
    _add_over(own, ranks, 2 * distance)
    _swap(own, other, ranks, distance)


def _swap(given: torch.Tensor, taken: torch.Tensor, ranks: RankGroup, distance: int) -> None:
    """Send one tensor to the rank so far away in the tree, and receive another from it."""
    partner = ranks.rank ^ distance
    calls = [
        dist.P2POp(call, tensor, group=ranks.group, group_peer=partner)
        for call, tensor in ((dist.isend, given), (dist.irecv, taken))
    ]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
