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
from switchcli.distributed.lost import explain_lost_ranks
from switchcli.distributed.mesh import CommDtype, RankGroup, to_comm_dtype
from switchcli.model.attention import Attention
from switchcli.model.axis import local_slice
from switchcli.model.layers import FeedForward, compute_dtype
from switchcli.model.moe.experts import Experts
from switchcli.model.transformer import SwitchTransformer

_DIVIDED = {"embedding": 0, "head": 0, "q": 0, "k": 0, "v": 0, "wi": 0, "wi_gate": 0, "o": 1, "wo": 1}
_DIVIDED |= {"position_bias": 1}
"""The dim of a weight that is divided, by its name: the vocabulary, the heads, d_ff."""


def sharded_dim(name: str) -> int | None:
    """The dim of the weight `name` that is divided; None where each rank has all of it."""
    parts = name.split(".")
    dim = _DIVIDED.get(parts[-2] if parts[-1] == "weight" else parts[-1])
    return None if dim is None else dim + (".experts." in name)


class TensorParallelAxis:
    """The parts of a model on the ranks of a group."""

    def __init__(self, ranks: RankGroup, comm_dtype: CommDtype) -> None:
        """`comm_dtype`: what sums are taken in."""
        self.rank, self.size, self._ranks, self._comm_dtype = ranks.rank, ranks.size, ranks, comm_dtype

    def enter_region(self, x: torch.Tensor) -> torch.Tensor:
        """x in the type of products."""
        entered: torch.Tensor = _Enter.apply(x.to(compute_dtype(x)), self._ranks, self._comm_dtype)  # type: ignore[no-untyped-call]
        return entered

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """In the type of x."""
        left: torch.Tensor = _Leave.apply(x, self._ranks, self._comm_dtype)  # type: ignore[no-untyped-call]
        return left

    @torch.no_grad()
    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        return _reduced(x, self._ranks, self._comm_dtype, dist.ReduceOp.MAX)

    @torch.no_grad()
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        all_gather(parts, x.contiguous(), self._ranks.group)
        return torch.cat(parts.chunk(self.size), dim=-1)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: RankGroup, comm_dtype: CommDtype) -> torch.Tensor:
        ctx.ranks, ctx.comm_dtype = ranks, comm_dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _reduced(gradient, ctx.ranks, ctx.comm_dtype), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: RankGroup, comm_dtype: CommDtype) -> torch.Tensor:
        return _reduced(x, ranks, comm_dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient, None, None


def _reduced(
    x: torch.Tensor, ranks: RankGroup, comm_dtype: CommDtype, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """In the type of x. A copy: what is given may be somebody else's too."""
    reduced = x.to(to_comm_dtype(x, comm_dtype), copy=True, memory_format=torch.contiguous_format)
    with explain_lost_ranks():
        dist.all_reduce(reduced, how, group=ranks.group)
    return reduced.to(x.dtype)


def shard_model(model: SwitchTransformer, ranks: RankGroup, comm_dtype: CommDtype) -> None:
    """Keep this rank's part of every weight that is divided, in place, and let the layers meet the other parts."""
    axis = TensorParallelAxis(ranks, comm_dtype)
    for module in model.modules():
        if isinstance(module, SwitchTransformer | Attention | FeedForward | Experts):
            module.axis = axis
    for name, weight in list(model.named_parameters()):
        dim = sharded_dim(name)
        if dim is not None:
            owner, _, attribute = name.rpartition(".")
            kept = local_slice(weight.detach(), axis, dim).clone()
            model.get_submodule(owner).register_parameter(attribute, nn.Parameter(kept, weight.requires_grad))
