"""all_gather: one name for a collective that torch renamed."""

import torch
import torch.distributed as dist

from switchcli.distributed.lost import explain_lost_ranks


def all_gather(gathered: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Write the ranks' tensors into `gathered`, one after the other along its first dim, on every rank. Collective.

    Args:
        gathered: [R * n, ...] for R ranks, contiguous. Gloo accepts no separate dim for the ranks.
        own: [n, ...] of the same dtype and device, the same n on every rank; contiguous.
        group: the ranks.

    Raises:
        LostRankError: another rank is gone.
    """
    # Looked up at each call, as tests count calls. torch 2.12 and older know the second name alone; 2.13 deprecates it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    with explain_lost_ranks():
        gather(gathered, own, group=group)
