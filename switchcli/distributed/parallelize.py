"""Parallelizing a model over a mesh, and the norm of a gradient whose parts are on many ranks.

The model is not written for it: it gets smaller weights, another dispatcher and another axis from outside.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from switchcli.distributed import expert_parallel, tensor_parallel
from switchcli.distributed.collectives import explain_lost_ranks
from switchcli.distributed.layout import Layout, ModelWeights, ShardedDim, is_dtensor, is_stacked, local_values
from switchcli.distributed.mesh import MeshGroups, RankGroup
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.moe.layer import local_experts
from switchcli.model.transformer import SwitchTransformer


def parallelize(model: SwitchTransformer, groups: MeshGroups, spec: ParallelSpec, device: torch.device) -> ModelWeights:
    """Shard `model`, which is on `meta`, in place, and allocate this rank's weights on `device`, without values.

    The order is: experts over the expert axis, all weights over the model axis, then what remains over the data axis
    and the replicas.
    """
    if groups.experts is not None:
        expert_parallel.shard_experts(model, groups.experts)
    if groups.model is not None:
        tensor_parallel.shard_model(model, groups.model)
    if groups.data is not None and spec.shard != "none":
        from switchcli.distributed import fsdp  # its imports take half as long as that of torch

        fsdp.shard_weights(model, groups, spec.shard, device.type)
        model.to_empty(device=device)
        fsdp.init_local_shards(model)
    else:
        model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    layouts = {name: _layout(name, parameter, groups) for name, parameter in parameters.items()}
    replica_index, num_replicas = _replica(parameters, groups)
    return ModelWeights(
        parameters,
        dict(model.named_buffers()),
        {name: layout for name, layout in layouts.items() if layout},
        local_experts(model),
        model.spec.num_experts,
        replica_index,
        num_replicas,
    )


def _layout(name: str, parameter: nn.Parameter, groups: MeshGroups) -> Layout:
    """Return how the weight `name` is sharded; of a stack, how each of its experts is.

    A division of a stack into whole experts, by the expert axis or by replicas, is no sharded dim.
    """
    layout = []
    dim = tensor_parallel.sharded_dim(name)
    if groups.model is not None and dim is not None:
        layout.append(ShardedDim(dim, groups.model, (parameter.shape[dim],) * groups.model.size))
    if is_dtensor(parameter) and not _replicas_hold_other_experts(name, parameter):
        from torch.distributed.tensor import Shard  # imported already, as there is a DTensor

        ranks = groups.replicas if is_stacked(name) else groups.data
        assert ranks is not None
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        dim = placement.dim
        # A DTensor has the shape from before fully_shard. Like torch.chunk, fully_shard gives each rank the length over
        # the number of ranks, rounded up; the last ranks get the rest, which may be nothing.
        full_length = parameter.shape[dim]
        chunk = -(-full_length // ranks.size)
        lengths = tuple(max(0, min(chunk, full_length - rank * chunk)) for rank in range(ranks.size))
        assert local_values(parameter).shape[dim] == lengths[ranks.rank]
        layout.append(ShardedDim(dim, ranks, lengths))
    return tuple(layout)


def _replica(parameters: Mapping[str, nn.Parameter], groups: MeshGroups) -> tuple[int, int]:
    """Return the number of this rank among those that store the same experts or slices of them, and their count.

    These are the ranks of its model axis in all replicas, numbered replica by replica.
    """
    replica, num_replicas = (0, 1) if groups.replicas is None else (groups.replicas.rank, groups.replicas.size)
    if any(_replicas_hold_other_experts(name, parameter) for name, parameter in parameters.items()):
        replica, num_replicas = 0, 1
    model_rank, model_size = (0, 1) if groups.model is None else (groups.model.rank, groups.model.size)
    return replica * model_size + model_rank, num_replicas * model_size


def _replicas_hold_other_experts(name: str, parameter: torch.Tensor) -> bool:
    """Return whether fully_shard divides the experts of the stack `name` among the replicas, each expert whole."""
    return is_stacked(name) and is_dtensor(parameter) and parameter.placements[0].is_shard(0)


class GradientNorm(NamedTuple):
    """Norms of a step's gradients, float32."""

    total: torch.Tensor
    """Scalar: norm of all gradients of all ranks, with the same bits on every rank."""
    local: dict[str, torch.Tensor]
    """Norm of this rank's slice of each gradient, by name of the parameter and in the order of the parameters: [1], or
    [E] for stacked experts."""


def gradient_norm(
    parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, Layout], groups: MeshGroups, device: torch.device
) -> GradientNorm:
    """Return the norms of the gradients; the total counts each slice once, whatever the number of its copies.

    Collective. Squares are float64: there the square of any float32 norm is finite, and not rounded to 0.

    Example: a mesh of data 4 x model 2, whose experts lie on 2 ranks of the data axis each, without `shard`:

    | gradient        | what a rank holds                 | squares are summed over     |
    |-----------------|-----------------------------------|-----------------------------|
    | norm            | all of it                         | no group                    |
    | attention query | half of the heads                 | model                       |
    | experts' wi     | half of the experts, half of d_ff | model, then experts         |

    Summed over the data axis as well, the squares of `norm` would count four times.
    """
    gradients = {name: local_values(one.grad) for name, one in parameters.items() if one.grad is not None}
    norms = _local_norms(gradients)
    # Gradients that are divided among the same groups are summed together. Their squares are then summed over these
    # groups, and over no others: along all other axes ranks have copies of the same gradients.
    norms_by_groups: dict[tuple[RankGroup, ...], list[torch.Tensor]] = {}
    for name, norm in norms.items():
        divided_over = [sharded.ranks for sharded in layouts.get(name, ())]
        if groups.experts is not None and is_stacked(name):
            divided_over.append(groups.experts)
        if groups.replicas is not None and _replicas_hold_other_experts(name, parameters[name]):
            divided_over.append(groups.replicas)
        norms_by_groups.setdefault(tuple(divided_over), []).append(norm)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rank_groups, local_norms in norms_by_groups.items():
        square = torch.cat(local_norms).to(device).double().square().sum()
        for ranks in rank_groups:
            with explain_lost_ranks():
                dist.all_reduce(square, group=ranks.group)
        total += square
    if any(norms_by_groups):
        # Sums over different groups may round differently, and ranks must not clip differently: the main rank decides.
        with explain_lost_ranks():
            dist.broadcast(total, src=0)
    return GradientNorm(total.sqrt().float(), {name: norms[name] for name in gradients})


def _local_norms(gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the norm of each gradient, [1], or of each expert's slice of a stack, [E]; stacks come first."""
    norms = {}
    for name, gradient in gradients.items():
        if is_stacked(name):
            norms[name] = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim)))
    dense = [name for name in gradients if name not in norms]
    if dense:
        dense_norms = torch._foreach_norm([gradients[name] for name in dense])
        norms |= {name: norm.reshape(1) for name, norm in zip(dense, dense_norms, strict=True)}
    return norms
