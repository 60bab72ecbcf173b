"""Sharding of weights over ranks that would hold the same ones, by torch's fully_shard (ZeRO, Rajbhandari et al. 2020).

A unit is a set of weights that is gathered at a time. There is one for the dense weights of each block, one for all
dense weights outside the blocks (embeddings, position biases, final norms), and one for the experts of each sparse
layer. Dense units are sharded over the data axis, units of experts over the replicas of these experts.

- `zero3` gathers a unit when it computes and frees it afterwards, except for the weights outside the blocks, which stay
  gathered from the forward pass to the end of the backward pass. Gradients are reduce-scattered in each microbatch.
- `zero2` keeps all units gathered from the forward pass to the end of the backward pass. Gradients are reduce-scattered
  once a step.

Gradients are reduced while the backward pass goes on. Everything is float32.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard as ShardPlacement

from switchcli.distributed.expert_parallel import local_expert_parameters
from switchcli.distributed.mesh import MeshGroups, RankGroup
from switchcli.distributed.parallel_spec import Shard, even_dim
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import DecoderBlock, EncoderBlock, SwitchTransformer


def shard_weights(model: SwitchTransformer, groups: MeshGroups, shard: Shard, device: str) -> None:
    """Keep this rank's shard of every weight of `model`, in place. Experts stay whole if `even_dim` finds no dim."""
    assert groups.data is not None
    is_zero3 = shard == "zero3"
    expert_parameters = set(local_expert_parameters(model).values())
    _shard_experts(model, groups, is_zero3, device)
    mesh = device_mesh(groups.data, device)
    blocks = [module for module in model.modules() if isinstance(module, EncoderBlock | DecoderBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=is_zero3, ignored_params=expert_parameters)
    # The last unit: all weights that are in no other one.
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=expert_parameters)
    if device == "cpu":  # gloo has no averaging reduction: sum, then divide
        for unit in fsdp_units(model):
            unit.set_force_sum_reduction_for_comms(True)
    # Decoding step by step calls these methods directly; their weights must be gathered as for `forward`.
    register_fsdp_forward_method(model, "encode")
    for block in blocks:
        if isinstance(block, DecoderBlock):
            register_fsdp_forward_method(block, "cross_key_value")


def _shard_experts(model: SwitchTransformer, groups: MeshGroups, is_zero3: bool, device: str) -> None:
    """Shard the experts of each layer over their replicas, in place, if a dim divides evenly."""
    assert groups.data is not None
    if groups.replicas is None:
        return
    replicas = groups.replicas
    dim = even_dim([parameter.shape for parameter in local_expert_parameters(model).values()], replicas.size)
    if dim is None:
        return
    mesh, placement = device_mesh(replicas, device), ShardPlacement(dim)
    for layer in sparse_layers(model).values():
        unit = fully_shard(
            layer.experts, mesh=mesh, reshard_after_forward=is_zero3, shard_placement_fn=lambda _: placement
        )
        # Divide by the number of ranks of the data axis, not by that of the replicas: an expert's gradient already
        # covers the tokens of its whole expert group (see ExpertGradients). The forced sum makes this a plain sum and a
        # division on every device; else NCCL would scale before it adds.
        unit.set_gradient_divide_factor(groups.data.size)
        unit.set_force_sum_reduction_for_comms(True)
        if dim == 0:  # each replica stores a slice of the experts
            num_stored = len(layer.experts.expert_ids) // replicas.size
            start = replicas.rank * num_stored
            layer.experts.expert_ids = layer.experts.expert_ids[start : start + num_stored]


def device_mesh(ranks: RankGroup, device: str) -> DeviceMesh:
    """Return the mesh of one dim over which weights are divided among `ranks`."""
    return DeviceMesh.from_group(ranks.group, device, mesh_dim_names=("shard",))


def init_local_shards(model: nn.Module) -> None:
    """Use each unit once, so that views of its shards stay valid from now on.

    `to_empty` has replaced the parameters. fully_shard notices this when it first gathers a unit, and may then move the
    shards to memory that it pads.
    """
    for unit in fsdp_units(model):
        unit.unshard()
        unit.reshard()


def experts_are_sharded(model: nn.Module) -> bool:
    """Return whether fully_shard manages the experts of `model`."""
    return any(isinstance(layer.experts, FSDPModule) for layer in sparse_layers(model).values())


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose weights fully_shard gathers at a time; empty without sharding."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
