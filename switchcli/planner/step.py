"""What a rank holds of a model, and how many rows its experts get: the numbers that the planner counts with.

Legend: G groups, E experts, C slots an expert, A rows, D model, F hidden, O outputs.

A mesh is data x model devices. The experts lie over groups of ranks of the data axis; the model axis divides heads,
d_ff (of experts too) and the vocabulary. Names and shapes are those of the model itself, made on `meta`: no tensor
takes memory, of a trillion parameters neither.
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch

from switchcli.distributed.layout import is_stacked, reduced_dim
from switchcli.distributed.mesh import Shard, even_dim
from switchcli.distributed.tensor_parallel import sharded_dim
from switchcli.model.config import ModelSpec, Stack
from switchcli.model.moe.router import RouterSpec

FLOAT = 4
"""Bytes of a weight, of its gradient, and of an element of the residual stream."""

Tensors = Mapping[str, torch.Tensor]
"""Tensors on `meta`, by name."""


class Mesh(NamedTuple):
    """`data` x `model` devices. Experts lie over groups of `expert` ranks of the data axis; each has data / expert
    replicas. `shard` says how ranks divide weights that each of them would hold."""

    data: int
    expert: int = 1
    model: int = 1
    shard: Shard = "none"

    @property
    def replicas(self) -> int:
        return self.data // self.expert

    def __str__(self) -> str:
        shard = "" if self.shard == "none" else f", {self.shard}"
        return f"data {self.data:,} x model {self.model}, expert {self.expert:,}{shard}"


class Step(NamedTuple):
    """The batch of one optimizer step, and what it is computed in."""

    sequences: int
    source: int
    target: int
    product_bytes: int = 2
    """Bytes of an element in the type of products: 4 is float32, 2 bfloat16."""
    router_bytes: int = FLOAT
    """Bytes of an element in the type of the routers' products: 2 in the paper's bfloat16 arm only."""
    fused: bool = True
    """Attention keeps no [B, H, N, S] and a norm keeps its input only, as on CUDA. False: as on a CPU."""
    recomputed: bool = False
    """Blocks keep their inputs alone and are computed again on the way back (`train.activation_checkpointing`)."""

    comm_bytes: int | None = None
    """Bytes of an element of dispatched tokens and of sums over the model axis; None: those of products."""
    ordered: bool = False
    """Gradients are added up by `parallel.reduction: ordered`."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of an element that travels."""
        return self.comm_bytes or self.product_bytes

    def length(self, stack: Stack) -> int:
        return self.source if stack == "encoder" else self.target


class RankWeights(NamedTuple):
    """What one rank of the model axis has of the model, before the data axis shares it; parameters and bytes."""

    dense: int
    """Parameters outside the experts."""
    expert: int
    """Parameters of all experts."""
    products: int
    """Parameters that autocast copies to bfloat16, and autograd keeps until the backward pass: dense weights."""
    units: tuple[int, ...]
    """Dense parameters that ZeRO gathers at a time: those in no block first, then those of each block."""
    expert_units: tuple[int, ...]
    """Parameters of the experts of each sparse layer, all of them: what ZeRO gathers at a time, times `Mesh.expert`."""
    expert_shapes: tuple[tuple[int, int], ...]
    """The first two dims of the stacked weights, each pair once."""
    dense_state: int
    """Bytes of optimizer state outside the experts."""
    expert_state: int
    """Bytes of optimizer state of all experts."""

    def expert_shards(self, mesh: Mesh) -> int:
        """Return among how many replicas the experts of a rank are divided; 1 where each replica has all of them."""
        shapes = [(count // mesh.expert, width) for count, width in self.expert_shapes]
        return mesh.replicas if mesh.shard != "none" and even_dim(shapes, mesh.replicas) is not None else 1


def rank_weights(weights: Tensors, state: Tensors, model: int) -> RankWeights:
    """What each of `model` ranks of the model axis has of the named `weights`, and of the optimizer's `state` for them.

    Which moments are factored is decided by the whole weight, so that the update is the same at any sharding.
    """
    units, expert_units, shapes = {"": 0}, Counter[str](), dict[tuple[int, int], None]()
    sums = dict.fromkeys(("dense", "expert", "products", "dense_state", "expert_state"), 0)
    for name, weight in weights.items():
        dim = sharded_dim(name)
        parts = 1 if dim is None else model
        numel = weight.numel() // parts
        sums["expert" if is_stacked(name) else "dense"] += numel
        if is_stacked(name):
            expert_units[name.rpartition(".")[0]] += numel
            shapes[weight.shape[0], weight.shape[1] // (parts if dim == 1 else 1)] = None
            continue
        stack, _, rest = name.partition(".blocks.")
        unit = f"{stack}.{rest.split('.')[0]}" if rest else ""
        units[unit] = units.get(unit, 0) + numel
        sums["products"] += numel if rest and dim is not None else 0
    for name, tensor in state.items():
        owner, _, slot = name.rpartition("/")
        num_bytes = tensor.numel() * tensor.element_size()
        dim = sharded_dim(owner)
        if owner in weights and tensor.ndim and dim not in (None, reduced_dim(slot, weights[owner].ndim)):
            num_bytes //= model
        sums["expert_state" if is_stacked(name) else "dense_state"] += num_bytes
    return RankWeights(
        units=tuple(units.values()), expert_units=tuple(expert_units.values()), expert_shapes=tuple(shapes), **sums
    )


class Slots(NamedTuple):
    """Slots and rows of one sparse layer in one microbatch."""

    capacity: int
    """C: slots of each expert in a group."""
    sent: int
    """Rows that a rank hands to the others, E * G * C: empty slots travel too. `counted`: a row for each choice."""
    counted: bool
    """Whether ranks tell each other how many rows come: where an expert has a slot for every token."""
    rows: int
    """A: rows that the experts of a rank compute."""


def slots(spec: ModelSpec, stack: Stack, step: Step, microbatch: int, expert: int) -> Slots:
    """What the router of `stack` gives in training, asked on `meta`; `microbatch` counts sequences."""
    rule = spec.router_of(stack)
    length = step.length(stack)
    groups = microbatch // rule.group_sequences
    tokens = rule.group_sequences * length
    capacity, most = _assigned(rule, tokens, spec.num_experts)
    counted = capacity >= tokens
    sent = groups * most if counted else spec.num_experts * groups * capacity
    return Slots(capacity, sent, counted, groups * most if expert == 1 else sent)


@cache
def _assigned(rule: RouterSpec, group_tokens: int, num_experts: int) -> tuple[int, int]:
    """C, and the most slots that can be filled, of one group."""
    with torch.device("meta"):
        logits, real = torch.empty(1, group_tokens, num_experts), torch.empty(1, group_tokens, dtype=torch.bool)
        routing = rule.assign(logits, real, "training")
    return routing.token_GEC.shape[2], routing.max_filled_slots


def output_widths(spec: ModelSpec) -> dict[str, int]:
    """O of each routed part: a Switch attention's experts give queries, and keys and values in one."""
    widths = {"attention": 2 * spec.num_heads * spec.head_width, "feed_forward": spec.d_model}
    return {part: width for part, width in widths.items() if spec.sparse in (part, "both")}
