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
from switchcli.distributed.layout import Cut, Cuts, Weights, here, is_stacked
from switchcli.distributed.lost import lost_ranks_explained
from switchcli.distributed.mesh import Groups, ParallelSpec, Shared
from switchcli.model.moe.layer import experts_here
from switchcli.model.transformer import SwitchTransformer


def spread(model: SwitchTransformer, groups: Groups, spec: ParallelSpec, device: torch.device) -> Weights:
    """Keep of `model`, which is on `meta`, what this rank holds, and give it memory on `device`: not filled yet."""
    if groups.experts is not None:
        expert_parallel.spread_experts(model, groups.experts, spec.wire)
    if groups.model is not None:
        tensor_parallel.divide(model, groups.model, spec.wire)
    if groups.data is not None and spec.shard != "none":
        fsdp.shard_weights(model, groups, spec.shard, device.type)
    model.to_empty(device=device)
    fsdp.settle(model)
    parameters = dict(model.named_parameters())
    cuts = {name: each for name, parameter in parameters.items() if (each := _cuts_of(name, parameter, groups))}
    replica, replicas = (0, 1) if groups.replicas is None else (groups.replicas.place, groups.replicas.size)
    if any(_is_divided(name, parameter) for name, parameter in parameters.items()):
        replica, replicas = 0, 1
    part, parts = (0, 1) if groups.model is None else (groups.model.place, groups.model.size)
    holder, holders = replica * parts + part, replicas * parts
    return Weights(parameters, cuts, experts_here(model), model.spec.num_experts, holder, holders)


def _cuts_of(name: str, parameter: nn.Parameter, groups: Groups) -> Cuts:
    """How the weight `name` is cut; stacks of which each rank has some experts are not."""
    cuts = []
    dim = tensor_parallel.divided_dim(name)
    if groups.model is not None and dim is not None:
        cuts.append(Cut(dim, groups.model, (parameter.shape[dim],) * groups.model.size))
    if isinstance(parameter, DTensor) and not _is_divided(name, parameter):
        ranks = groups.replicas if is_stacked(name) else groups.data
        assert ranks is not None
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        dim = placement.dim
        length = parameter.shape[dim]
        each = -(-length // ranks.size)  # the last ones may have less, or nothing
        lengths = tuple(max(0, min(each, length - place * each)) for place in range(ranks.size))
        assert here(parameter).shape[dim] == lengths[ranks.place]
        cuts.append(Cut(dim, ranks, lengths))
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
    parameters: Mapping[str, nn.Parameter], cuts: Mapping[str, Cuts], groups: Groups, device: torch.device
) -> GradientNorm:
    """The norm of the gradients of all ranks' parameters, each part counted once.

    Squares are float64, which a float32 norm of any size has. Ranks that sum over other groups may round otherwise: the
    main one's is taken.
    """
    gradients = {name: here(one.grad) for name, one in parameters.items() if one.grad is not None}
    own = {
        name: torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim)))  # of all experts at once
        for name, gradient in gradients.items()
        if is_stacked(name)
    }
    others = [name for name in gradients if name not in own]
    if others:
        norms = torch._foreach_norm([gradients[name] for name in others])
        own |= {name: norm.reshape(1) for name, norm in zip(others, norms, strict=True)}
    parts: dict[tuple[Shared, ...], list[torch.Tensor]] = {}
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
            with lost_ranks_explained():
                dist.all_reduce(square, group=ranks.group)
        total += square
    if any(parts):
        with lost_ranks_explained():
            dist.broadcast(total, src=0)
    return GradientNorm(total.sqrt().float(), {name: own[name] for name in gradients})
