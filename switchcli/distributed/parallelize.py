"""A model over the ranks of a mesh: what each of them holds of it, and the norm of a gradient that lies on all.

Everything here comes from outside: the model is the same plain one, with other weights, dispatcher and axis.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from switchcli.distributed import expert_parallel, fsdp, tensor_parallel
from switchcli.distributed.layout import Layout, ModelWeights, ShardedDim, is_stacked, local_values
from switchcli.distributed.lost import explain_lost_ranks
from switchcli.distributed.mesh import MeshGroups, ParallelSpec, RankGroup
from switchcli.model.moe.layer import local_experts
from switchcli.model.transformer import SwitchTransformer


def parallelize(model: SwitchTransformer, groups: MeshGroups, spec: ParallelSpec, device: torch.device) -> ModelWeights:
    """Keep of `model`, which is on `meta`, what this rank holds, and give it memory on `device`: not filled yet."""
    if groups.experts is not None:
        expert_parallel.shard_experts(model, groups.experts, spec.comm_dtype)
    if groups.model is not None:
        tensor_parallel.shard_model(model, groups.model, spec.comm_dtype)
    if groups.data is not None and spec.shard != "none":
        fsdp.shard_weights(model, groups, spec.shard, device.type)
    model.to_empty(device=device)
    fsdp.init_local_shards(model)
    parameters = dict(model.named_parameters())
    cuts = {name: each for name, parameter in parameters.items() if (each := _layout_of(name, parameter, groups))}
    replica, replicas = (0, 1) if groups.replicas is None else (groups.replicas.rank, groups.replicas.size)
    if any(_is_divided(name, parameter) for name, parameter in parameters.items()):
        replica, replicas = 0, 1
    part, parts = (0, 1) if groups.model is None else (groups.model.rank, groups.model.size)
    holder, holders = replica * parts + part, replicas * parts
    return ModelWeights(parameters, cuts, local_experts(model), model.spec.num_experts, holder, holders)


def _layout_of(name: str, parameter: nn.Parameter, groups: MeshGroups) -> Layout:
    """How the weight `name` is cut; stacks of which each rank has some experts are not."""
    cuts = []
    dim = tensor_parallel.sharded_dim(name)
    if groups.model is not None and dim is not None:
        cuts.append(ShardedDim(dim, groups.model, (parameter.shape[dim],) * groups.model.size))
    if isinstance(parameter, DTensor) and not _is_divided(name, parameter):
        ranks = groups.replicas if is_stacked(name) else groups.data
        assert ranks is not None
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        dim = placement.dim
        length = parameter.shape[dim]
        each = -(-length // ranks.size)  # the last ones may have less, or nothing
        lengths = tuple(max(0, min(each, length - place * each)) for place in range(ranks.size))
        assert local_values(parameter).shape[dim] == lengths[ranks.rank]
        cuts.append(ShardedDim(dim, ranks, lengths))
    return tuple(cuts)


def _is_divided(name: str, parameter: nn.Parameter) -> bool:
    """Return whether replicas of a stack of experts hold some of its experts each, whole ones."""
    return is_stacked(name) and isinstance(parameter, DTensor) and parameter.placements[0].is_shard(0)


class GradientNorm(NamedTuple):
    """Norms of a step's gradients, float32: of all of them, equal on every rank, and of this rank's part of each."""

    total: torch.Tensor
    own: dict[str, torch.Tensor]
    """[1] by the name of the parameter, or [E] of stacked experts; in the order of the parameters."""


def gradient_norm(
    parameters: Mapping[str, nn.Parameter], cuts: Mapping[str, Layout], groups: MeshGroups, device: torch.device
) -> GradientNorm:
    """The norm of the gradients of all ranks' parameters, each part counted once.

    Squares are float64, which a float32 norm of any size has. Ranks that sum over other groups may round otherwise: the
    main one's is taken.
    """
    gradients = {name: local_values(one.grad) for name, one in parameters.items() if one.grad is not None}
    own = {
        name: torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim)))  # of all experts at once
        for name, gradient in gradients.items()
        if is_stacked(name)
    }
    others = [name for name in gradients if name not in own]
    if others:
        norms = torch._foreach_norm([gradients[name] for name in others])
        own |= {name: norm.reshape(1) for name, norm in zip(others, norms, strict=True)}
    parts: dict[tuple[RankGroup, ...], list[torch.Tensor]] = {}
    for name, norm in own.items():
        among = [cut.ranks for cut in cuts.get(name, ())]
        if groups.experts is not None and is_stacked(name):
            among.append(groups.experts)
        if groups.replicas is not None and _is_divided(name, parameters[name]):
            among.append(groups.replicas)
        parts.setdefault(tuple(among), []).append(norm)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for those, each in parts.items():
        square = torch.cat(each).to(device).double().square().sum()
        for ranks in those:
            with explain_lost_ranks():
                dist.all_reduce(square, group=ranks.group)
        total += square
    if any(parts):
        with explain_lost_ranks():
            dist.broadcast(total, src=0)
    return GradientNorm(total.sqrt().float(), {name: own[name] for name in gradients})
