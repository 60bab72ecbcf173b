"""Weights outside the experts in shards over the data axis, by torch's fully_shard (ZeRO, Rajbhandari et al. 2020).

A block is a unit, and what is in no block one more: the embeddings, the position biases, the last norms. `zero3`
gathers a block's weights when it computes; the last unit stays whole from the forward pass to the end of the way back,
and under `zero2` all of them do. Gradients are scattered as they come; under `zero2` once a step. All in float32.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from switchcli.distributed.expert_parallel import expert_parameters
from switchcli.distributed.mesh import Shard, Shared
from switchcli.model.transformer import DecoderBlock, EncoderBlock, SwitchTransformer


def shard_dense(model: SwitchTransformer, ranks: Shared, shard: Shard, device: str) -> None:
    """Keep this rank's shard of every weight that is no expert's, in place."""
    mesh = DeviceMesh.from_group(ranks.group, device, mesh_dim_names=("data",))
    experts = set(expert_parameters(model).values())
    blocks = [module for module in model.modules() if isinstance(module, EncoderBlock | DecoderBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=shard == "zero3", ignored_params=experts)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=experts)
    for unit in units(model):
        unit.set_force_sum_reduction_for_comms(device == "cpu")  # gloo cannot sum what it scales
    register_fsdp_forward_method(model, "encode")  # what decoding step by step calls besides `forward`
    for block in blocks:
        if isinstance(block, DecoderBlock):
            register_fsdp_forward_method(block, "source")


def settle(model: nn.Module) -> None:
    """Have torch make its own of the memory that the shards were given: from now on they stay where they are."""
    for unit in units(model):
        unit.unshard()
        unit.reshard()


def units(model: nn.Module) -> list[FSDPModule]:
    """What is gathered at a time."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
