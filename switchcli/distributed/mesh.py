"""The mesh: the axes over which a run is parallel, and the process groups of each rank (paper section 5).

A mesh has `data` x `model` ranks. Rank r = d * model + m has position d on the data axis and m on the model axis.

- Ranks along the model axis, which have neighboring numbers, compute the same batch. Each holds a slice of the heads,
  of d_ff and of the vocabulary.
- Ranks along the data axis compute different slices of the batch.
- The expert axis is part of the data axis: each run of `expert` consecutive positions on it holds all experts once, and
  the data / expert runs are replicas of each other.
"""

from datetime import timedelta
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.system.signals import run_interruptibly


class RankGroup(NamedTuple):
    """A process group, its number of ranks, and this process's rank in it."""

    group: dist.ProcessGroup
    size: int
    rank: int


class MeshGroups(NamedTuple):
    """The process groups that this rank belongs to, by axis; None for an axis of one rank."""

    data: RankGroup | None = None
    """Ranks with other slices of the batch and the same slice of the model."""
    model: RankGroup | None = None
    """Ranks with the same slice of the batch and other slices of the model."""
    experts: RankGroup | None = None
    """Ranks of `data` that together hold all experts once."""
    replicas: RankGroup | None = None
    """Ranks of `data` that hold the same experts: all of `data` if `experts` is None."""


def build_groups(spec: ParallelSpec, rank: int, world: int, timeout: timedelta) -> MeshGroups:
    """Create the process groups of the mesh, and return those of this rank.

    Collective: every rank creates all groups in the same order, also those that it does not belong to.
    """
    # Rank numbers [replicas, expert, model], numbered along the last dim first. The first two dims are the data axis.
    ranks = torch.arange(world).view(-1, spec.expert, spec.model)

    def create(partition: torch.Tensor) -> RankGroup | None:
        """Create a group of the ranks in each row, and return that of this rank; None if rows have one rank."""
        rows: list[list[int]] = partition.tolist()
        if len(rows[0]) == 1:
            return None
        group, _ = run_interruptibly(partial(dist.new_subgroups_by_enumeration, rows, timeout=timeout))
        row = next(row for row in rows if rank in row)
        return RankGroup(cast(dist.ProcessGroup, group), len(row), row.index(rank))

    data = create(ranks.flatten(0, 1).T)  # [model, data]
    return MeshGroups(
        data=data,
        model=create(ranks.flatten(0, 1)),  # [data, model]
        experts=create(ranks.transpose(1, 2).flatten(0, 1)),  # [replicas * model, expert]
        replicas=create(ranks.flatten(1).T) if spec.expert > 1 else data,  # [expert * model, replicas]
    )
