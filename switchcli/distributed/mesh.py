"""The mesh: which ranks share what (paper section 5).

`data` x `model` ranks. Those of a model axis lie side by side: they have the same batch, and each a part of the heads,
of d_ff and of the vocabulary. Along the data axis each has a share of the batch. Experts lie over the data axis too: a
group of `expert` ranks, neighbours on it, holds all of them once, and the groups are replicas of each other.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator

from switchcli.distributed.signals import run_interruptibly
from switchcli.errors import RecipeError
from switchcli.model.config import ModelSpec
from switchcli.spec import MOST, Spec

Shard = Literal["none", "zero2", "zero3"]
CommDtype = Literal["compute", "float32"]
Reduction = Literal["fast", "ordered"]


class ParallelSpec(Spec):
    """How a run is spread over its ranks; what it learns does not depend on it. `parallel: auto` asks the plan."""

    auto: bool = False
    """Take the fastest mesh that `switchcli plan` finds for the ranks and the main one's memory, at the rates that are
    its defaults, instead of the keys below."""
    data: int | None = Field(default=None, ge=1, le=MOST["ranks"])
    """Ranks among which the batch is shared; absent: as many as are started, over `model`."""
    model: int = Field(default=1, ge=1, le=MOST["ranks"])
    """Ranks among which the heads, d_ff (of experts too) and the vocabulary are divided; a divisor of each."""
    expert: int = Field(default=1, ge=1, le=MOST["ranks"])
    """Ranks of the data axis among which the experts of each sparse layer are shared; a divisor of both."""
    shard: Shard = "none"
    """What ranks that hold the same weights divide among them: of experts their replicas, of all else the data axis.
    `zero2`: optimizer state, and gradients after the last microbatch; `zero3`: the weights too, which are gathered a
    block at a time, and those in no block for a whole step. Experts stay undivided if neither their number nor the
    widths of their weights are multiples of the number of replicas."""
    comm_dtype: CommDtype = "compute"
    """What tokens on their way to experts, and the sums of a model axis, travel in: as products are computed, or, where
    that is bfloat16, twice as many bytes, and sums that are not rounded to it in between."""
    reduction: Reduction = "fast"
    """How gradients are added up over microbatches and ranks. `fast`: as it suits the ranks, whose number shows in the
    last bits. `ordered`: as the number of microbatches alone says, so that 1, 2, 4, ... ranks, each with the whole
    model and the same hardware, threads and torch, end with the same bits; it wants `train.microbatch_tokens`. It costs
    memory, a gradient for each time that a rank's microbatches can be halved, and sums over ranks after the way back
    instead of during it: 1.03 of `fast`'s step (quartiles 0.92 to 1.21) on two ranks of one machine."""

    @property
    def is_unset(self) -> bool:
        """Whether it says nothing of the mesh."""
        said = (self.data, self.model, self.expert, self.shard, self.reduction)
        return said == (None, 1, 1, "none", "fast")

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, said: Any) -> Any:
        return {"auto": True} if said == "auto" else said

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.auto and self.reduction == "ordered":
            raise ValueError("auto chooses a mesh, and reduction: ordered takes the data axis alone: leave out one")
        if self.auto and not self.is_unset:
            raise ValueError("auto chooses data, model, expert and shard: leave them out, or auto")
        cut = {"model": self.model, "expert": self.expert, "shard": self.shard if self.shard != "none" else 1}
        divided = " and ".join(f"{name} ({value})" for name, value in cut.items() if value != 1)
        if self.reduction == "ordered" and divided:
            raise ValueError(
                f"reduction: ordered wants the whole model on each rank: leave out {divided}, or take reduction: fast"
            )
        return self


def to_comm_dtype(x: torch.Tensor, comm_dtype: CommDtype) -> torch.dtype:
    """What x, if it is no index, travels in."""
    return torch.promote_types(x.dtype, torch.float32) if comm_dtype == "float32" and x.is_floating_point() else x.dtype


ALONE = ParallelSpec()
"""Each rank holds the whole model."""


def indivisible_sizes(spec: ModelSpec, model: int) -> Iterator[tuple[str, int]]:
    """The sizes of a model that a model axis must divide and does not: key and size."""
    sizes = {"model.num_heads": spec.num_heads, "model.d_ff": spec.d_ff, "model.vocab_size": spec.vocab_size}
    yield from ((key, size) for key, size in sizes.items() if size % model)


def divides_experts(spec: ModelSpec, model: int) -> bool:
    """Whether a model axis can divide the experts: those of an attention it cannot."""
    return model == 1 or spec.num_experts == 1 or spec.sparse == "feed_forward"


def even_dim(shapes: Collection[Sequence[int]], ranks: int) -> int | None:
    """Return the dim along which stacked expert weights of these shapes are sharded over `ranks`; None: not at all.

    Dim 0 counts experts, so that each stays whole on one rank. FSDP pads no other dim, so all must be multiples.
    """
    return next((dim for dim in (0, 1) if all(shape[dim] % ranks == 0 for shape in shapes)), None)


class RankGroup(NamedTuple):
    """A set of ranks that do something together, and this rank's place among them."""

    group: dist.ProcessGroup
    size: int
    rank: int


class MeshGroups(NamedTuple):
    """The ranks that this one does something with; None where it would be alone."""

    data: RankGroup | None = None
    """Ranks with other shares of the batch and the same part of the model."""
    model: RankGroup | None = None
    """Ranks with the same share of the batch and other parts of the model."""
    experts: RankGroup | None = None
    """Ranks of `data` that hold all experts between them."""
    replicas: RankGroup | None = None
    """Ranks of `data` that hold the same experts: all of `data` if `experts` is None."""


def check_world(spec: ParallelSpec, world: int) -> None:
    """Raise a RecipeError where `world` ranks cannot be laid out so."""
    data, rest = divmod(world, spec.model)
    if spec.reduction == "ordered" and world & (world - 1):
        fewer = 2 ** (world.bit_length() - 1)
        raise RecipeError(
            f"parallel.reduction: ordered adds up pairs of ranks, then pairs of pairs, which {world} ranks are not: "
            f"start {fewer} or {2 * fewer}, by --processes {fewer} say, or take parallel.reduction=fast"
        )
    if spec.data is not None and spec.data * spec.model != world:
        wanted = spec.data * spec.model
        mesh = f"parallel.data ({spec.data})" + (f" x parallel.model ({spec.model})" if spec.model > 1 else "")
        raise RecipeError(
            f"{mesh} is not the number of ranks ({world}): start {wanted}, by --processes {wanted} say, or leave "
            "parallel.data out"
        )
    if rest:
        raise RecipeError(
            f"parallel.model ({spec.model}) must divide the number of ranks ({world}): start a multiple of "
            f"{spec.model}, by --processes {spec.model} say, or take parallel.model={math.gcd(spec.model, world)}"
        )
    if data % spec.expert:
        ranks = f"the number of ranks ({world})" if spec.model == 1 else f"the ranks of the data axis ({data})"
        wanted = spec.expert * spec.model
        raise RecipeError(
            f"parallel.expert ({spec.expert}) must divide {ranks}: start a multiple of {wanted}, by --processes "
            f"{wanted} say, or take parallel.expert={math.gcd(spec.expert, data)}"
        )


def build_groups(spec: ParallelSpec, rank: int, world: int, timeout: timedelta) -> MeshGroups:
    """The groups of this rank; called by all ranks in the same order, once they have met."""
    model, expert = spec.model, spec.expert
    group = model * expert

    def mine(partition: list[list[int]]) -> RankGroup | None:
        if len(partition[0]) == 1:
            return None
        made, _ = run_interruptibly(partial(dist.new_subgroups_by_enumeration, partition, timeout=timeout))
        ranks = next(ranks for ranks in partition if rank in ranks)
        return RankGroup(made, len(ranks), ranks.index(rank))

    data = mine([list(range(place, world, model)) for place in range(model)])
    return MeshGroups(
        data=data,
        model=mine([list(range(first, first + model)) for first in range(0, world, model)]),
        experts=mine(
            [
                [first + place + model * number for number in range(expert)]
                for first in range(0, world, group)
                for place in range(model)
            ]
        ),
        replicas=mine([list(range(place, world, group)) for place in range(group)]) if expert > 1 else data,
    )
