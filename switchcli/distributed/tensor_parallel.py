"""The model axis: heads, d_ff and the vocabulary divided over ranks that compute the same batch (paper section 5.3).

Each of m ranks stores d_ff / m hidden units of every feed-forward (of experts too), num_heads / m heads, and
vocab_size / m rows of the vocabulary. Every attention and feed-forward is one region, as in Megatron-LM:

- Its input is the same on all ranks. The gradient of the input is the sum of all ranks' gradients: an all-reduce of
  [tokens, D] in the backward pass.
- Its output is the sum of all ranks' partial outputs: an all-reduce of [tokens, D] in the forward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.collectives import all_gather, explain_lost_ranks
from switchcli.distributed.mesh import RankGroup
from switchcli.model.attention import Attention
from switchcli.model.layers import FeedForward, compute_dtype, local_slice
from switchcli.model.moe.experts import Experts
from switchcli.model.transformer import SwitchTransformer

_SHARDED_DIMS = {
    # The vocabulary: [V, D].
    "embedding": 0,
    "head": 0,
    # Heads: outputs of the projections [H * K, D], inputs of the output projection [D, H * K], columns of [buckets, H].
    "q": 0,
    "k": 0,
    "v": 0,
    "o": 1,
    "position_bias": 1,
    # Hidden units: outputs of the first products [F, D], inputs of the second [D, F].
    "wi": 0,
    "wi_gate": 0,
    "wo": 1,
}
"""The dim that the model axis divides, by the name of the weight or of its module, without the dim of the experts."""


def sharded_dim(name: str) -> int | None:
    """Return the dim of the weight `name` that the model axis divides; None for a weight that every rank stores."""
    path = name.split(".")
    dim = _SHARDED_DIMS.get(path[-2] if path[-1] == "weight" else path[-1])
    if dim is None:
        return None
    return dim + 1 if ".experts." in name else dim  # dim 0 of a stack counts experts


class TensorParallelAxis:
    """The `ModelAxis` of a model whose heads, hidden units and vocabulary are divided among the ranks of a group."""

    def __init__(self, ranks: RankGroup) -> None:
        self.rank = ranks.rank
        self.size = ranks.size
        self._ranks = ranks

    def enter_region(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in the dtype of products. Its gradient is summed over the ranks in this dtype."""
        entered: torch.Tensor = _EnterRegion.apply(x.to(compute_dtype(x)), self._ranks)
        return entered

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' x, in the dtype of x."""
        total: torch.Tensor = _LeaveRegion.apply(x, self._ranks)
        return total

    @torch.no_grad()
    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        return _all_reduce(x, self._ranks, dist.ReduceOp.MAX)

    @torch.no_grad()
    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        # The collective concatenates along dim 0: [R * n, ..., d]. The slices belong side by side: [n, ..., R * d].
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        all_gather(gathered, x.contiguous(), self._ranks.group)
        return torch.cat(gathered.chunk(self.size), dim=-1)


class _EnterRegion(torch.autograd.Function):
    """The identity forward, an all-reduce of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: RankGroup) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(gradient, ctx.ranks), None


class _LeaveRegion(torch.autograd.Function):
    """An all-reduce forward, the identity backward: all ranks compute the same function of the sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: RankGroup) -> torch.Tensor:
        return _all_reduce(x, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def _all_reduce(
    x: torch.Tensor, ranks: RankGroup, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    """Return the reduction of all ranks' x. x is copied, because autograd may use it elsewhere."""
    reduced = x.clone(memory_format=torch.contiguous_format)
    with explain_lost_ranks():
        dist.all_reduce(reduced, operation, group=ranks.group)
    return reduced


def shard_model(model: SwitchTransformer, ranks: RankGroup) -> None:
    """Keep this rank's slice of every weight that the model axis divides, in place, and connect the layers to the axis.

    Call it after `shard_experts`, if at all: stacks may hold any number of experts.
    """
    axis = TensorParallelAxis(ranks)
    for module in model.modules():
        if isinstance(module, SwitchTransformer | Attention | FeedForward | Experts):
            module.axis = axis
    for name, weight in list(model.named_parameters()):
        dim = sharded_dim(name)
        if dim is not None:
            module_name, _, attribute = name.rpartition(".")
            local = local_slice(weight.detach(), axis, dim).clone()
            model.get_submodule(module_name).register_parameter(attribute, nn.Parameter(local, weight.requires_grad))
