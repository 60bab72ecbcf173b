"""Settings of the mesh (mesh.py), and whether a model and a number of ranks fit them."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import model_validator

from switchcli.errors import RecipeError
from switchcli.model.config import ModelSpec
from switchcli.spec import Size, Spec

Shard = Literal["none", "zero2", "zero3"]


class ParallelSpec(Spec):
    """The mesh that a run uses; what the run learns does not depend on it. `parallel: auto` stands for `auto: true`."""

    auto: bool = False
    """Take the first mesh of `switchcli plan` for these ranks and the main rank's memory, the one that divides the
    model least, instead of the keys below."""
    data: Size | None = None
    """Number of ranks that share the batch; absent: all ranks that are started, divided by `model`."""
    model: Size = 1
    """Number of ranks that divide the heads, d_ff (of experts too) and the vocabulary; it must divide each of these. 1:
    every rank holds all of them."""
    expert: Size = 1
    """Number of ranks of the data axis that divide the experts of each sparse layer; it must divide both numbers. 1:
    every rank holds all experts."""
    shard: Shard = "none"
    """What ranks that hold the same weights divide among them. `zero2`: the optimizer state, and the gradients after
    the last microbatch. `zero3`: also the weights, which are gathered for one block at a time, and those outside the
    blocks for a microbatch. Experts are divided among their replicas, all other weights over the data axis. Experts
    stay undivided if the number of replicas divides neither their number nor the widths of their weights."""

    @property
    def is_unset(self) -> bool:
        """Whether every key that describes the mesh has its default."""
        return (self.data, self.model, self.expert, self.shard) == (None, 1, 1, "none")

    @model_validator(mode="before")
    @classmethod
    def _accept_auto(cls, value: Any) -> Any:
        return {"auto": True} if value == "auto" else value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.auto and not self.is_unset:
            raise ValueError("auto chooses data, model, expert and shard: leave them out, or auto")
        return self


ALONE = ParallelSpec()
"""The default mesh: data parallelism, with the whole model on each rank."""


def mesh_problems(spec: ModelSpec, model: int, expert: int) -> Iterator[str]:
    """Yield each reason why axes of `model` and `expert` ranks cannot divide the weights of a model."""
    sizes = {"model.num_heads": spec.num_heads, "model.d_ff": spec.d_ff, "model.vocab_size": spec.vocab_size}
    sizes |= {"model.expert_d_ff": spec.expert_d_ff or 0, "model.shared_d_ff": spec.shared_d_ff}
    for key, size in sizes.items():
        if size % model:
            yield f"{key} ({size}) must be a multiple of parallel.model ({model}): try {math.gcd(size, model)}."
    experts = spec.num_experts
    if experts > 1 and model > 1 and spec.sparse != "feed_forward":
        yield f"parallel.model ({model}) does not divide the experts of an attention (model.sparse): leave it out."
    if experts == 1 < expert:
        yield f"parallel.expert ({expert}): the model is dense (model.num_experts: 1): leave it out."
    elif experts % expert:
        divisors = ", ".join(str(number) for number in range(1, experts + 1) if experts % number == 0)
        rule = f"must divide the {experts} experts of a layer (model.num_experts)"
        yield f"parallel.expert ({expert}) {rule}: take one of {divisors}."


def batch_problem(rows: int, ranks: int, microbatch: int | None, group: int, length: int) -> str | None:
    """Return why `ranks` of the data axis cannot share a batch of `rows` sequences; None if they can.

    A sequence has `length` tokens. A rank takes equal microbatches of `microbatch` sequences, or all its sequences at
    once (None). A microbatch consists of whole routing groups of `group` sequences.
    """
    whole_batch = -(-rows // (ranks * group)) * ranks * group * length  # rounded up
    if rows % ranks:
        return (
            f"train.batch_tokens ({rows * length}) holds {rows} sequences, which {ranks} ranks cannot share evenly: "
            f"try {whole_batch}, or fewer ranks"
        )
    rank_rows = rows // ranks
    groups = f"must consist of whole groups of {group * length} tokens (model.router.group_sequences: {group})"
    if rank_rows % group:
        of_rank = f", {rank_rows} sequences on each of {ranks} ranks," if ranks > 1 else ""
        return f"train.batch_tokens ({rows * length}){of_rank} {groups}: try {whole_batch}"
    each = microbatch or rank_rows
    if rank_rows % each or each % group:
        share = f"train.batch_tokens ({rows * length})" + (f" / {ranks} ranks" if ranks > 1 else "")
        rule = f"must divide {share}" if rank_rows % each else groups
        # The largest number of whole groups, up to the given one, that divides the rows of a rank; one group does.
        largest = max(group, min(each, rank_rows) // group * group)
        fitting = next(number for number in range(largest, 0, -group) if rank_rows % number == 0)
        return f"train.microbatch_tokens ({each * length}) {rule}: try {fitting * length}"
    return None


def even_dim(shapes: Collection[Sequence[int]], num_shards: int) -> int | None:
    """Return the dim along which stacked expert weights [E, ...] are sharded; None if no dim divides evenly in all.

    Dim 0 is preferred: it counts experts, so that each expert stays whole on one rank. Dim 1 is the alternative, which
    torch's fully_shard does not pad.
    """
    return next((dim for dim in (0, 1) if all(shape[dim] % num_shards == 0 for shape in shapes)), None)


def check_world(spec: ParallelSpec, world: int) -> None:
    """Raise a RecipeError if `world` ranks cannot form the mesh."""
    data, remainder = divmod(world, spec.model)
    if spec.data is not None and spec.data * spec.model != world:
        needed = spec.data * spec.model
        mesh = f"parallel.data ({spec.data})" + (f" x parallel.model ({spec.model})" if spec.model > 1 else "")
        raise RecipeError(
            f"{mesh} is not the number of ranks ({world}): start {needed}, for example by --processes {needed}, or "
            "leave parallel.data out"
        )
    if remainder:
        raise RecipeError(
            f"parallel.model ({spec.model}) must divide the number of ranks ({world}): start a multiple of "
            f"{spec.model}, for example by --processes {spec.model}, or take "
            f"parallel.model={math.gcd(spec.model, world)}"
        )
    if data % spec.expert:
        ranks = f"the number of ranks ({world})" if spec.model == 1 else f"the ranks of the data axis ({data})"
        needed = spec.expert * spec.model
        raise RecipeError(
            f"parallel.expert ({spec.expert}) must divide {ranks}: start a multiple of {needed}, for example by "
            f"--processes {needed}, or take parallel.expert={math.gcd(spec.expert, data)}"
        )
