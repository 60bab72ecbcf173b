"""Layouts: which slice of each weight this rank stores, and how the slices of all ranks form the full tensor.

- A dense weight may be sharded along the model axis (tensor_parallel.py), and along its first dim over the data axis
  (fsdp.py). Both may shard the same dim.
- A stacked expert weight [E, ...] holds only the experts of this rank, by the expert axis and, if replicas divide the
  number of experts, by the replica. A layout does not describe this slice of dim 0: checkpoints store each expert under
  its global number. It describes how each of these experts is sharded along the model axis, and over replicas that do
  not divide the number of experts.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed.collectives import all_gather, explain_lost_ranks
from switchcli.distributed.mesh import RankGroup
from switchcli.model.moe.layer import local_experts
from switchcli.model.transformer import SwitchTransformer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class ShardedDim(NamedTuple):
    """A dim of a tensor that is divided among the ranks of a group, in the order of the ranks."""

    dim: int
    ranks: RankGroup
    lengths: tuple[int, ...]
    """Length of each rank's slice along `dim`. Lengths may differ, and may be 0."""


Layout = tuple[ShardedDim, ...]
"""The sharded dims of one tensor, in the order in which they are applied: each one divides the result of those before.
Empty for a tensor that every rank stores in full. A dim may occur twice."""


class LocalPart(NamedTuple):
    """The slice of a full tensor that this rank stores."""

    tensor: torch.Tensor
    layout: Layout = ()

    @property
    def full_shape(self) -> torch.Size:
        """The shape of the full tensor."""
        shape = list(self.tensor.shape)
        for sharded in reversed(self.layout):  # undo the last division first
            shape[sharded.dim] = sum(sharded.lengths)
        return torch.Size(shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The position of this slice in the full tensor, one `slice` for each dim."""
        start = [0] * self.tensor.ndim
        for sharded in self.layout:
            # If a dim is divided twice, the second offset counts from the start of the first slice: offsets add up.
            start[sharded.dim] += sum(sharded.lengths[: sharded.ranks.rank])
        return tuple(slice(first, first + length) for first, length in zip(start, self.tensor.shape, strict=True))

    @torch.no_grad()
    def copy_from(self, full_tensor: torch.Tensor) -> None:
        """Copy this rank's slice of `full_tensor` into the local tensor."""
        self.tensor.copy_(full_tensor[self.slices])

    def gather(self) -> torch.Tensor:
        """Return the full tensor on every rank; the local tensor itself if it is not sharded. Collective."""
        tensor = self.tensor
        for sharded in reversed(self.layout):  # undo the last division first
            tensor = _gather_dim(tensor, sharded)
        return tensor


def _gather_dim(tensor: torch.Tensor, sharded: ShardedDim) -> torch.Tensor:
    """Return the slices of all ranks, concatenated along the sharded dim. Collective."""
    max_length = max(sharded.lengths)
    # all_gather concatenates tensors of equal length along dim 0: the sharded dim goes first, padded to the longest.
    local = tensor.movedim(sharded.dim, 0)
    padded = local.new_zeros(max_length, *local.shape[1:])
    padded[: len(local)] = local
    gathered = local.new_empty(sharded.ranks.size * max_length, *local.shape[1:])
    all_gather(gathered, padded, sharded.ranks.group)
    slices = [
        padded_slice[:length]
        for padded_slice, length in zip(torch.split(gathered, max_length), sharded.lengths, strict=True)
    ]
    return torch.cat(slices).movedim(0, sharded.dim)


def sum_over_shards(sums: Sequence[tuple[torch.Tensor, Layout]]) -> None:
    """Sum each tensor, in place, over the ranks of all groups in its layout. Collective.

    Tensors that are summed over the same group share one all-reduce.
    """
    for ranks in dict.fromkeys(sharded.ranks for _, layout in sums for sharded in layout):
        tensors = [tensor for tensor, layout in sums if any(sharded.ranks == ranks for sharded in layout)]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with explain_lost_ranks():
            dist.all_reduce(flat, group=ranks.group)
        totals = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total.view_as(tensor))


MOMENTUM = "momentum"
"""The slot of the optimizer state that the hidden matrices have which Muon orthogonalizes, and no other weight."""


def reduced_dim(slot: str, ndim: int) -> int | None:
    """Return the dim of a parameter with `ndim` dims over which an optimizer slot is a mean; None if it has all dims.

    Adafactor's row means lack the last dim of the parameter, and its column means the one before.
    """
    return {"row": ndim - 1, "column": ndim - 2}.get(slot)


def is_stacked(name: str) -> bool:
    """Return whether the parameter `name` is a stack of experts: dim 0 counts experts."""
    return ".experts." in f".{name}"


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor, as the weights that fully_shard manages are."""
    # Importing DTensor takes half as long as importing torch. A process that has not done so has none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values that this rank stores, detached, as a view: the shard of a DTensor, else the tensor itself."""
    tensor = tensor.detach()
    return tensor.to_local() if is_dtensor(tensor) else tensor


class ModelWeights(NamedTuple):
    """The slices of a model's weights that this rank stores."""

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, torch.Tensor]
    """The biases of routers, which every rank stores in full."""
    layouts: Mapping[str, Layout]
    """Layout of each sharded parameter, by name; parameters that are stored in full have no entry."""
    experts: range
    """Global numbers of the experts in each local stack."""
    num_experts: int
    """Number of experts in each sparse layer, over all ranks."""
    replica_index: int = 0
    """Number of this rank among the `num_replicas` ranks that store the same experts, or slices of the same experts."""
    num_replicas: int = 1

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint stores, by name."""
        return {**self.parameters, **self.buffers}

    def load_full(self, full_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy this rank's slice of each full weight. A stack comes with the local experts only, each of them full."""
        tensors = self.tensors
        for name, full_tensor in full_tensors:
            LocalPart(local_values(tensors[name]), self.layouts.get(name, ())).copy_from(full_tensor)


def unsharded_weights(model: SwitchTransformer) -> ModelWeights:
    """Return the weights of a model that this process stores in full."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    return ModelWeights(parameters, buffers, {}, local_experts(model), model.spec.num_experts)
