"""The mesh: which ranks share what (paper section 5).

Every rank takes a share of the batch (data parallel). Experts lie over the same ranks: a group of `expert` ranks, one
beside the other, holds all of them once, and the groups are replicas of each other.
"""

import math
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from pydantic import Field

from switchcli.errors import RecipeError
from switchcli.spec import Spec


class ParallelSpec(Spec):
    """How a run is spread over its ranks. What it learns does not depend on it."""

    data: int | None = Field(default=None, ge=1)
    """Ranks among which the batch is shared; absent: as many as are started."""
    expert: int = Field(default=1, ge=1)
    """Ranks among which the experts of each sparse layer are shared; a divisor of the ranks and of the experts."""


ALONE = ParallelSpec()
"""Each rank holds the whole model."""


class Shared(NamedTuple):
    """A set of ranks that do something together, and this rank's place among them."""

    group: dist.ProcessGroup
    size: int
    place: int


class Groups(NamedTuple):
    """The ranks that this one does something with, where experts are spread; None where it would be alone."""

    experts: Shared | None = None
    """The ranks that hold all experts between them."""
    replicas: Shared | None = None
    """The ranks that hold the same experts."""


def check_world(spec: ParallelSpec, world: int) -> None:
    """Raise a RecipeError where `world` ranks cannot be laid out so."""
    if spec.data not in (None, world):
        raise RecipeError(
            f"parallel.data ({spec.data}) is not the number of ranks ({world}): start {spec.data}, by --processes "
            f"{spec.data} say, or leave it out"
        )
    if world % spec.expert:
        raise RecipeError(
            f"parallel.expert ({spec.expert}) must divide the number of ranks ({world}): start a multiple of "
            f"{spec.expert}, by --processes {spec.expert} say, or take parallel.expert={math.gcd(spec.expert, world)}"
        )


def groups_of(spec: ParallelSpec, rank: int, world: int, timeout: timedelta) -> Groups:
    """The groups of this rank; called by all ranks in the same order, once they have met."""
    size = spec.expert
    if size == 1:
        return Groups()
    experts = [list(range(first, first + size)) for first in range(0, world, size)]
    replicas = [list(range(place, world, size)) for place in range(size)]
    return Groups(_mine(experts, rank, timeout), _mine(replicas, rank, timeout) if world > size else None)


def _mine(partition: list[list[int]], rank: int, timeout: timedelta) -> Shared:
    group, _ = dist.new_subgroups_by_enumeration(partition, timeout=timeout)  # type: ignore[no-untyped-call]
    ranks = next(ranks for ranks in partition if rank in ranks)
    return Shared(group, len(ranks), ranks.index(rank))
