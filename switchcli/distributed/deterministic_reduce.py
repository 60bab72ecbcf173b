"""The `ordered` reduction: a sum of gradients whose order depends only on the number of microbatches of a step.

A floating-point sum depends on the order of its additions. If every rank first added up its own microbatches, that
order, and so the last bits, would depend on the number of ranks. Here the order is a fixed binary tree:

- A step of 2**k * odd microbatches is divided into 2**k runs of `odd` consecutive microbatches. Autograd adds up the
  gradients of a run from left to right: these sums are the leaves of the tree.
- Each level above adds neighbors: leaves in pairs, then pairs of pairs, up to the root.

With 2**j ranks, j <= k, each rank computes a subtree of 2**(k - j) leaves, and the top j levels are added between
ranks. The tree is the same for every j. In an addition between two ranks either one may be the left operand: a + b and
b + a have the same bits.

Example with 12 microbatches = 2**2 runs of 3, on two ranks: rank 0 computes (run 0 + run 1), rank 1 computes
(run 2 + run 3), and the two sums are added between the ranks.
"""

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.mesh import RankGroup


class DeterministicReduce:
    """Adds up the gradients of one step in the order of the tree. Between two steps it holds no tensors."""

    def __init__(self, ranks: RankGroup | None) -> None:
        """`ranks`: the data axis, a power of two of ranks; None for a single rank."""
        self._ranks = ranks
        self._sums: list[list[torch.Tensor]] = []
        """Finished subtrees of this rank that wait for their right neighbor, the largest first, each with a gradient
        for every parameter. After n runs they have sizes as the set bits of n: after 6 runs, one of 4 and one of 2."""

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Copy the first rank's weights to all ranks. Collective."""
        if self._ranks is not None:
            for parameter in model.parameters():
                dist.broadcast(parameter, group_src=0, group=self._ranks.group)

    @torch.no_grad()
    def add(self, model: nn.Module, position: int, count: int) -> None:
        """Add the gradient of this rank's microbatch `position` of `count`, counted from 1, after its backward pass.

        After the last one, every `.grad` is the sum over all microbatches of all ranks, and the call is collective.
        """
        if position == 1:
            self._sums.clear()  # left by a step that failed
        num_runs = count & -count  # the lowest set bit: the largest power of two that divides count
        num_finished, position_in_run = divmod(position, count // num_runs)
        if position_in_run:
            return  # within a run: autograd adds the next gradient to this one
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        self._sums.append([parameter.grad for parameter in parameters if parameter.grad is not None])
        for parameter in parameters:
            parameter.grad = None
        # As carries of a binary counter: run n completes a subtree of two neighbors for each factor of 2 in n.
        while num_finished % 2 == 0:
            torch._foreach_add_(self._sums[-2], self._sums.pop())
            num_finished //= 2
        if position == count:
            for parameter, gradient in zip(parameters, self._sum_over_ranks(self._sums.pop()), strict=True):
                parameter.grad = gradient

    def _sum_over_ranks(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums of the gradients over the ranks, and empty the list `gradients`. Collective."""
        if self._ranks is None:
            return gradients
        shapes = [gradient.shape for gradient in gradients]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        gradients.clear()  # frees their memory for the buffers of the exchange
        _all_reduce_pairwise(flat, self._ranks, 1)
        sums = torch.split(flat, [shape.numel() for shape in shapes])
        return [total.view(shape) for total, shape in zip(sums, shapes, strict=True)]


def _all_reduce_pairwise(x: torch.Tensor, ranks: RankGroup, distance: int) -> None:
    """Replace `x` [n], on each rank the sum over `distance` ranks, by the sum over all ranks. Collective.

    One call is one level of the tree, `distance` = 1, 2, 4, ..., size / 2. A rank and its partner, the rank at
    `distance`, exchange halves of `x`, and each of them adds up one half. The higher levels add this half alone;
    afterwards the partners exchange their finished halves. So a rank sends n/2 + n/4 + ... elements on the way up, and
    as many on the way down, as in a ring all-reduce. The tree is the same for every element, whichever rank adds it.
    """
    if distance == ranks.size:
        return
    middle = len(x) // 2
    halves = x[:middle], x[middle:]
    # The bit `distance` of the rank tells which half this rank adds up: 0 the first, 1 the second.
    is_upper = bool(ranks.rank & distance)
    kept_half, sent_half = halves[is_upper], halves[not is_upper]
    received = torch.empty_like(kept_half)
    _exchange(sent_half, received, ranks, distance)
    kept_half.add_(received)
    del received  # before the levels above allocate their own
    _all_reduce_pairwise(kept_half, ranks, 2 * distance)
    _exchange(kept_half, sent_half, ranks, distance)  # the sum of the other half overwrites what was sent


def _exchange(sent: torch.Tensor, received: torch.Tensor, ranks: RankGroup, distance: int) -> None:
    """Send one tensor to the partner of this level of the tree, and receive its tensor into `received`."""
    partner = ranks.rank ^ distance  # differs in the bit of this level only
    operations = [
        dist.P2POp(dist.isend, sent, group=ranks.group, group_peer=partner),
        dist.P2POp(dist.irecv, received, group=ranks.group, group_peer=partner),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
