"""Which part of each weight is here, and how parts make a whole.

A dense weight may be cut along the model axis (tensor_parallel.py) and, along its first dim, over the data axis
(fsdp.py); both cuts may fall on one dim. Of stacked experts a rank holds some, by the expert axis and, where replicas
divide them, by its replica. Each of these may be cut along the model axis, and over replicas that cannot divide the
number of experts.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from switchcli.distributed.gather import all_gather
from switchcli.distributed.lost import explain_lost_ranks
from switchcli.distributed.mesh import RankGroup
from switchcli.model.moe.layer import local_experts
from switchcli.model.transformer import SwitchTransformer


class ShardedDim(NamedTuple):
    """A dim of a tensor, of which each of some ranks has a part."""

    dim: int
    ranks: RankGroup
    lengths: tuple[int, ...]
    """The length of each rank's part along `dim`; lengths may differ and be 0."""


Layout = tuple[ShardedDim, ...]
"""The cuts of one tensor, in the order in which the whole is cut."""


class LocalPart(NamedTuple):
    """What is here of a whole tensor."""

    tensor: torch.Tensor
    layout: Layout = ()

    @property
    def full_shape(self) -> torch.Size:
        shape = list(self.tensor.shape)
        for cut in reversed(self.layout):
            shape[cut.dim] = sum(cut.lengths)
        return torch.Size(shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where in the whole it lies."""
        start = [0] * self.tensor.ndim
        for cut in self.layout:
            start[cut.dim] += sum(cut.lengths[: cut.ranks.rank])
        return tuple(slice(first, first + length) for first, length in zip(start, self.tensor.shape, strict=True))

    @torch.no_grad()
    def copy_from(self, whole: torch.Tensor) -> None:
        """Take the values, in place, from where it lies in another whole."""
        self.tensor.copy_(whole[self.slices])

    def gather(self) -> torch.Tensor:
        """All ranks' parts together, on each of them; the tensor itself where it is whole."""
        whole = self.tensor
        for cut in reversed(self.layout):
            whole = _gathered(whole, cut)
        return whole


def _gathered(tensor: torch.Tensor, cut: ShardedDim) -> torch.Tensor:
    most = max(cut.lengths)
    front = tensor.movedim(cut.dim, 0)
    padded = front.new_zeros(most, *front.shape[1:])
    padded[: len(front)] = front
    parts = front.new_empty(cut.ranks.size * most, *front.shape[1:])
    all_gather(parts, padded, cut.ranks.group)
    kept = [part[:length] for part, length in zip(torch.split(parts, most), cut.lengths, strict=True)]
    return torch.cat(kept).movedim(0, cut.dim)


def sum_over_shards(sums: Sequence[tuple[torch.Tensor, Layout]]) -> None:
    """Sum each tensor, in place, over the ranks of its cuts: those of the same ranks in one collective."""
    for ranks in dict.fromkeys(cut.ranks for _, cuts in sums for cut in cuts):
        tensors = [tensor for tensor, cuts in sums if any(cut.ranks == ranks for cut in cuts)]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with explain_lost_ranks():
            dist.all_reduce(flat, group=ranks.group)
        for tensor, summed in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def reduced_dim(slot: str, ndim: int) -> int | None:
    """The dim of a parameter of `ndim` dims that a slot of an optimizer lacks: means by row its last, by column the one
    before."""
    return {"row": ndim - 1, "column": ndim - 2}.get(slot)


def is_stacked(name: str) -> bool:
    """Return whether the parameter `name` holds one slice an expert along dim 0."""
    return ".experts." in f".{name}"


def local_values(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor that are here, detached, as a view: of a shard, or of all."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ModelWeights(NamedTuple):
    """The parameters of a model as far as this rank holds them."""

    parameters: Mapping[str, nn.Parameter]
    layouts: Mapping[str, Layout]
    """The cuts of each parameter that is cut, by name."""
    experts: range
    """The numbers of the experts in each stack."""
    num_experts: int
    """Experts of a layer on all ranks."""
    holder: int = 0
    """This rank's number among the `num_holders` ranks that hold the same experts, or parts of them."""
    num_holders: int = 1

    def load_full(self, whole: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take from each whole weight what is here of it; of a stack the whole of these experts."""
        for name, tensor in whole:
            LocalPart(local_values(self.parameters[name]), self.layouts.get(name, ())).copy_from(tensor)


def unsharded_weights(model: SwitchTransformer) -> ModelWeights:
    """Return the weights of a model that this process holds completely."""
    return ModelWeights(dict(model.named_parameters()), {}, local_experts(model), model.spec.num_experts)
