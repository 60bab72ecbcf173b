"""The model axis: heads, d_ff and the vocabulary over ranks that have the same batch (paper section 5.3).

Each rank has d_ff / m hidden units of every feed-forward, of experts too, H / m heads, and V / m rows of the
vocabulary. A part is entered with an x that all ranks have, and left with an all-reduce of [tokens, D]; the gradient of
x is an all-reduce of the same size.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.gather import all_gather
from switchcli.distributed.lost import lost_ranks_explained
from switchcli.distributed.mesh import Shared, Wire, on_the_wire
from switchcli.model.attention import Attention
from switchcli.model.axis import part_of
from switchcli.model.layers import FeedForward, compute_dtype
from switchcli.model.moe.experts import Experts
from switchcli.model.transformer import SwitchTransformer

_DIVIDED = {"embedding": 0, "head": 0, "q": 0, "k": 0, "v": 0, "wi": 0, "wi_gate": 0, "o": 1, "wo": 1}
_DIVIDED |= {"position_bias": 1}
"""The dim of a weight that is divided, by its name: the vocabulary, the heads, d_ff."""


def divided_dim(name: str) -> int | None:
    """The dim of the weight `name` that is divided; None where each rank has all of it."""
    parts = name.split(".")
    dim = _DIVIDED.get(parts[-2] if parts[-1] == "weight" else parts[-1])
    return None if dim is None else dim + (".experts." in name)


class ModelAxis:
    """The parts of a model on the ranks of a group."""

    def __init__(self, ranks: Shared, wire: Wire) -> None:
        """`wire`: what sums are taken in."""
        self.place, self.size, self._ranks, self._wire = ranks.place, ranks.size, ranks, wire

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """x in the type of products."""
        entered: torch.Tensor = _Enter.apply(x.to(compute_dtype(x)), self._ranks, self._wire)  # type: ignore[no-untyped-call]
        return entered

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """In the type of x."""
        left: torch.Tensor = _Leave.apply(x, self._ranks, self._wire)  # type: ignore[no-untyped-call]
        return left

    @torch.no_grad()
    def largest(self, x: torch.Tensor) -> torch.Tensor:
        return _reduced(x, self._ranks, self._wire, dist.ReduceOp.MAX)

    @torch.no_grad()
    def side_by_side(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        all_gather(parts, x.contiguous(), self._ranks.group)
        return torch.cat(parts.chunk(self.size), dim=-1)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Shared, wire: Wire) -> torch.Tensor:
        ctx.ranks, ctx.wire = ranks, wire
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _reduced(gradient, ctx.ranks, ctx.wire), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Shared, wire: Wire) -> torch.Tensor:
        return _reduced(x, ranks, wire)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def _reduced(
    x: torch.Tensor, ranks: Shared, wire: Wire, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """In the type of x. A copy: what is given may be somebody else's too."""
    reduced = x.to(on_the_wire(x, wire), copy=True, memory_format=torch.contiguous_format)
    with lost_ranks_explained():
        dist.all_reduce(reduced, how, group=ranks.group)
    return reduced.to(x.dtype)


def divide(model: SwitchTransformer, ranks: Shared, wire: Wire) -> None:
    """Keep this rank's part of every weight that is divided, in place, and let the layers meet the other parts."""
    axis = ModelAxis(ranks, wire)
    for module in model.modules():
        if isinstance(module, SwitchTransformer | Attention | FeedForward | Experts):
            module.axis = axis
    for name, weight in list(model.named_parameters()):
        dim = divided_dim(name)
        if dim is not None:
            owner, _, attribute = name.rpartition(".")
            kept = part_of(weight.detach(), axis, dim).clone()
            model.get_submodule(owner).register_parameter(attribute, nn.Parameter(kept, weight.requires_grad))
