"""The collectives of a training step on one rank of a mesh: kind, axis, number of calls, bytes (paper section 5).

Legend: G groups of a rank's microbatch, E experts, C slots of an expert, D model, F hidden, O outputs.

- A sum over a dim that the model axis divides takes an all-reduce forward and one backward.
- Dispatched tokens take an all-to-all to the experts and one back, and both again in the backward pass. Each moves
  E * G * C rows; at a fixed capacity factor this does not depend on E, apart from the rounding of C and its minimum.
- If blocks are recomputed, their forward collectives run twice.

Left out are collectives of a few numbers a step (counts of targets, norms, metrics), and Adafactor's sums over sharded
rows and columns.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from switchcli.model.config import STACKS, ModelSpec
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Step, output_widths, slots

INT64 = 8
"""Bytes of an index or a count."""

Kind = Literal["all_reduce", "all_to_all", "all_gather", "reduce_scatter"]
Axis = Literal["data", "expert", "replica", "model"]
"""`expert` and `replica` are parts of the data axis: ranks with other experts, and ranks with the same experts."""


class Collective(NamedTuple):
    """One kind of call, which every rank makes in a step."""

    kind: Kind
    axis: Axis
    ranks: int
    """Number of ranks that take part."""
    what: str
    """What is sent."""
    calls: int
    """Calls in a step. A gradient that is summed in several buckets counts as one."""
    payload_bytes: int
    """Bytes that one rank passes to one call: its own shard for an all-gather, the full tensor for the others."""

    @property
    def network_bytes(self) -> int:
        """Bytes that leave a rank in a step.

        Of R ranks each sends (R - 1) / R of an all-to-all, to the others. In a ring, a reduce-scatter sends (R - 1) / R
        of the tensor, an all-gather R - 1 shards, and an all-reduce is one after the other.
        """
        tensors_sent = {"all_reduce": 2.0, "all_to_all": 1.0, "reduce_scatter": 1.0, "all_gather": float(self.ranks)}
        return round(self.calls * self.payload_bytes * tensors_sent[self.kind] * (self.ranks - 1) / self.ranks)


def collectives(
    spec: ModelSpec, step: Step, mesh: Mesh, weights: RankWeights, microbatch: int
) -> tuple[Collective, ...]:
    """Return all collectives of a step with microbatches of `microbatch` sequences.

    `weights` are `rank_weights` for the model axis of `mesh`.
    """
    num_microbatches = step.num_microbatches(mesh, microbatch)
    candidates = [
        *_gradients(mesh, weights, num_microbatches),
        *_whole_matrices(mesh, weights),
        *_tokens(spec, step, mesh, microbatch, num_microbatches),
        *_model_axis(spec, step, mesh, microbatch, num_microbatches),
    ]
    return tuple(call for call in candidates if call.ranks > 1 and call.calls and call.payload_bytes)


def _gradients(mesh: Mesh, weights: RankWeights, num_microbatches: int) -> Iterator[Collective]:
    """Yield the sums of gradients, and the all-gathers of sharded weights.

    Gradients are reduced once a step, after the last microbatch; with zero3, in each microbatch. zero2 gathers a unit
    once a step. zero3 gathers it twice in each microbatch: before the forward and before the backward pass. The first
    unit, the weights outside the blocks, stays gathered in between. Recomputation gathers nothing more: it is part of
    the backward pass of a block, for which the block is gathered.
    """
    data = mesh.data
    num_reductions = num_microbatches if mesh.shard == "zero3" else 1
    gathers_per_reduction = 2 if mesh.shard == "zero3" else 1
    if mesh.shard == "none":
        yield Collective("all_reduce", "data", data, "dense gradients", 1, FLOAT * weights.dense)
    else:
        # Units of equal size become one entry: numbers of calls by the size of the unit.
        outside_blocks, *blocks = weights.units
        gathers = Counter({outside_blocks: num_reductions})
        for unit in blocks:
            gathers[unit] += num_reductions * gathers_per_reduction

        for unit, calls in gathers.items():
            shard = -(-FLOAT * unit // data)  # rounded up: fully_shard pads
            yield Collective("all_gather", "data", data, "dense weights", calls, shard)
        for unit, num_units in Counter(weights.units).items():
            calls = num_units * num_reductions
            yield Collective("reduce_scatter", "data", data, "dense gradients", calls, FLOAT * unit)
    axis = _replica_axis(mesh)
    num_shards = weights.expert_shards(mesh)
    if num_shards == 1:
        experts = FLOAT * weights.expert // mesh.expert
        yield Collective("all_reduce", axis, mesh.replicas, "expert gradients", 1, experts)
        return
    for unit, num_layers in Counter(weights.expert_units).items():
        payload, calls = FLOAT * unit // mesh.expert, num_layers * num_reductions
        gathers_of_unit = calls * gathers_per_reduction
        yield Collective("all_gather", axis, mesh.replicas, "expert weights", gathers_of_unit, payload // num_shards)
        yield Collective("reduce_scatter", axis, mesh.replicas, "expert gradients", calls, payload)


def _replica_axis(mesh: Mesh) -> Axis:
    """Return the axis of the ranks that hold the same experts."""
    return "data" if mesh.expert == 1 else "replica"


def _whole_matrices(mesh: Mesh, weights: RankWeights) -> Iterator[Collective]:
    """Yield the all-gathers of Muon, which needs whole matrices: once a step over the data axis, then the model axis.

    The calls for several matrices count as one. Experts that are whole on a rank stay there.
    """
    if not weights.dense_orthogonal_flops + weights.expert_orthogonal_flops:
        return
    # `products` are the matrices of the blocks, which Muon updates; AdamW has the other dense weights.
    dense, experts = FLOAT * weights.products, FLOAT * weights.expert // mesh.expert
    if mesh.shard != "none":
        yield Collective("all_gather", "data", mesh.data, "dense updates", 1, dense // mesh.data)
    yield Collective("all_gather", "model", mesh.model, "dense updates", 1, dense)
    whole = weights.whole_expert_shards(mesh)
    if (num_shards := weights.expert_shards(mesh)) > whole:
        yield Collective("all_gather", _replica_axis(mesh), mesh.replicas, "expert updates", 1, experts // num_shards)
    yield Collective("all_gather", "model", mesh.model, "expert updates", 1, experts // whole)


def _tokens(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int, num_microbatches: int) -> Iterator[Collective]:
    """Yield the all-to-alls of dispatched tokens, and what goes with them (see distributed/expert_parallel.py)."""
    if mesh.expert == 1:
        return
    widths = output_widths(spec)
    for stack in spec.sparse_stacks:
        num_layers = len(spec.sparse_layers(stack))
        layer_slots = slots(spec, stack, step, microbatch, mesh.expert)
        forward = num_layers * (1 + step.recomputed) * num_microbatches
        forward_and_backward = forward + num_layers * num_microbatches
        bytes_per_column = step.product_bytes * layer_slots.sent_rows  # of [rows, D] and [rows, O]
        for part, width in widths.items():
            what = f"{stack} tokens" if spec.sparse == "feed_forward" else f"{stack} tokens of {part}"
            for direction, columns in (("dispatch", spec.d_model), ("combine", width)):
                payload = bytes_per_column * columns
                what_sent = f"{what}, {direction}"
                yield Collective("all_to_all", "expert", mesh.expert, what_sent, forward_and_backward, payload)
        # Without a gradient, and so in forward passes only, once for each routed part:
        calls = len(widths) * forward
        if spec.experts_dropout:
            # The number of each row's sequence, and the masks [B, F / m] of all sequences.
            indices = INT64 * layer_slots.sent_rows
            masks = step.product_bytes * microbatch * spec.expert_width // mesh.model
            yield Collective("all_to_all", "expert", mesh.expert, f"{stack} dropout, whose rows", calls, indices)
            yield Collective("all_gather", "expert", mesh.expert, f"{stack} dropout, masks", calls, masks)
        if layer_slots.is_dropless:
            counts = INT64 * spec.num_experts  # [R, L]: rows for each expert
            yield Collective("all_to_all", "expert", mesh.expert, f"{stack} counts", calls, counts)


def _model_axis(
    spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int, num_microbatches: int
) -> Iterator[Collective]:
    """Yield the sums over the model axis.

    They are [tokens, D] forward and backward for each attention and feed-forward, the embeddings, the loss, and the
    gradients of tensors that enter several regions at once. A recomputed dense block without dropout leaves out its
    last sum, because nothing needs it; it counts all the same.
    """
    model = mesh.model
    for stack in STACKS:
        num_blocks, tokens = spec.num_blocks(stack), microbatch * step.length(stack)
        regions = 3 if stack == "decoder" else 2  # self-attention, cross-attention, feed-forward
        num_regions = regions * num_blocks + (len(spec.sparse_layers(stack)) if spec.shared_d_ff else 0)
        calls = (2 + step.recomputed) * num_regions * num_microbatches
        layer_bytes = step.product_bytes * tokens * spec.d_model
        yield Collective("all_reduce", "model", model, f"{stack} layers", calls, layer_bytes)
        # Each rank looks up the tokens of its rows of the vocabulary; the others are 0. float32.
        embedding_bytes = FLOAT * tokens * spec.d_model
        yield Collective("all_reduce", "model", model, f"{stack} embedding", num_microbatches, embedding_bytes)
        num_layers = len(spec.sparse_layers(stack))
        if num_layers:
            # Gradient of the weights of all slots, [G, E, C] with G = microbatch / group_sequences.
            slots_of_group = spec.num_experts * slots(spec, stack, step, microbatch, mesh.expert).capacity
            gates = step.router_bytes * slots_of_group * microbatch // spec.router_of(stack).group_sequences
            yield Collective("all_reduce", "model", model, f"{stack} gates", num_layers * num_microbatches, gates)
    # The encoder's output enters all cross-attentions at once: its gradient is summed once.
    encoded = step.product_bytes * microbatch * step.source * spec.d_model
    yield Collective("all_reduce", "model", model, "gradient of the encoder's output", num_microbatches, encoded)
    # Two float32 numbers for each target: the largest logit, and the sum of the exponentials.
    num_targets = microbatch * step.target
    yield Collective("all_reduce", "model", model, "loss", 2 * num_microbatches, FLOAT * num_targets)
    # The hidden states enter the softmax.
    hidden = step.product_bytes * num_targets * spec.d_model
    yield Collective("all_reduce", "model", model, "gradient of hidden states", num_microbatches, hidden)
