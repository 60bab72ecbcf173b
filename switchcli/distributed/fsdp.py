"""Weights in shards over ranks that would hold the same, by torch's fully_shard (ZeRO, Rajbhandari et al. 2020).

The dense weights of a block are a unit, and those in no block one more: the embeddings, the position biases, the last
norms. They are sharded over the data axis. The experts of a layer are a unit too, over their replicas. `zero3` gathers
a unit's weights when it computes; those in no block stay whole from the forward pass to the end of the backward pass,
and under `zero2` all units do. Gradients are reduced and scattered as they come, while the backward pass goes on; under
`zero2` once a step. All in float32.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard as ShardDim

from switchcli.distributed.expert_parallel import local_expert_parameters
from switchcli.distributed.mesh import MeshGroups, RankGroup, Shard, even_dim
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import DecoderBlock, EncoderBlock, SwitchTransformer


def shard_weights(model: SwitchTransformer, groups: MeshGroups, shard: Shard, device: str) -> None:
    """Keep this rank's shard of every weight, in place; of experts none if `even_dim` finds none."""
    assert groups.data is not None
    is_zero3 = shard == "zero3"
    experts = local_expert_parameters(model)
    dim = None if groups.replicas is None else even_dim([one.shape for one in experts.values()], groups.replicas.size)
    if groups.replicas is not None and dim is not None:
        mesh, placement = _mesh(groups.replicas, device), ShardDim(dim)
        for layer in sparse_layers(model).values():
            unit = fully_shard(
                layer.experts, mesh=mesh, reshard_after_forward=is_zero3, shard_placement_fn=lambda _: placement
            )
            # Not by the number of replicas, see ExpertGradients: a plain sum, which is then divided, on every device.
            unit.set_gradient_divide_factor(groups.data.size)
            unit.set_force_sum_reduction_for_comms(True)
            if dim == 0:
                count = len(layer.experts.expert_ids) // groups.replicas.size
                layer.experts.expert_ids = layer.experts.expert_ids[groups.replicas.rank * count :][:count]
    mesh, ignored = _mesh(groups.data, device), set(experts.values())  # those that stay whole
    blocks = [module for module in model.modules() if isinstance(module, EncoderBlock | DecoderBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=is_zero3, ignored_params=ignored)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
    if device == "cpu":  # gloo has no average
        for unit in fsdp_units(model):
            unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "encode")  # what decoding step by step calls besides `forward`
    for block in blocks:
        if isinstance(block, DecoderBlock):
            register_fsdp_forward_method(block, "cross_key_value")


def _mesh(ranks: RankGroup, device: str) -> DeviceMesh:
    return DeviceMesh.from_group(ranks.group, device, mesh_dim_names=("shard",))


def init_local_shards(model: nn.Module) -> None:
    """Have torch make its own of the memory that the shards were given: from now on they stay where they are."""
    for unit in fsdp_units(model):
        unit.unshard()
        unit.reshard()


def experts_are_sharded(model: nn.Module) -> bool:
    """Return whether experts are among what is sharded."""
    return any(isinstance(layer.experts, FSDPModule) for layer in sparse_layers(model).values())


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """What is gathered at a time."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
