"""What one device of a mesh holds in a training step, in bytes: weights, gradients, optimizer state, activations.

Legend: B sequences, S keys, N queries of all sequences, D model, F hidden, W heads * K, E experts, A rows, O outputs.

Parameters, gradients and optimizer state are float32; products are taken in float32 or bfloat16 (`Step.product_bytes`).
Activations are what autograd keeps between forward and backward, added up part by part from the code of `model`;
tests/planner/test_memory_use.py holds them against what it does keep. The sum is a bound of the peak: gradients grow
while activations go. Of a step on a CPU torch's own count finds 0.78 to 0.99 of it; where blocks are computed again,
0.73 to 1.0: autocast's copies of weights are gone by then, and count.

Not modelled: what a kernel takes for itself, fragments of memory, the buffers of collectives other than those of the
tokens, input dropout, packed rows, torch.compile, a teacher, and weights that do not learn (`update`): they count as if
they did.
"""

from typing import NamedTuple

from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Slots, Step, output_widths, slots

CHUNK = 1024
"""Targets whose logits are held at a time (train/loss.py)."""


class DeviceBytes(NamedTuple):
    """What one device holds at the end of a forward pass, in bytes."""

    weights: int
    gradients: int
    """Twice those that DistributedDataParallel sums, where there are several microbatches: in the first step it lays
    them out anew while they hold something. Added up in order, one for each level of the tree on this rank, and two
    between ranks."""
    optimizer: int
    copies: int
    """Weights in bfloat16: the dense ones until the way back, the experts of one layer at a time. Where a step has
    several microbatches, the largest gradient of one before it is added to the others'."""
    activations: int
    dispatch: int
    """Tokens on their way to the experts of other ranks and back: what is sent and what has come."""
    vocabulary: int
    """Logits of a chunk and their gradient; that of the softmax matrix, which the loss makes on the way forward."""

    @property
    def total(self) -> int:
        return sum(self)


class ActivationBytes(NamedTuple):
    """Bytes that autograd keeps of one microbatch, by part."""

    norms: int
    """With the residual stream."""
    attention: int
    feed_forward: int
    routers: int
    experts: int

    @property
    def total(self) -> int:
        return sum(self)


def device_bytes(spec: ModelSpec, step: Step, mesh: Mesh, own: RankWeights, microbatch: int) -> DeviceBytes:
    """What a device of `mesh` holds with microbatches of so many sequences; `own` is `held` for its model axis."""
    experts = own.expert // mesh.expert
    count = step.sequences // mesh.data // microbatch
    several = count > 1
    weights, gradients, state = _dense_bytes(mesh, own, several)
    expert_weights, of_experts, expert_state = _expert_bytes(mesh, own, several)
    if step.ordered:
        at_once = max(min(mesh.data, 2), (count & -count).bit_length())
        gradients, of_experts = at_once * gradients, at_once * of_experts
    elif several and mesh.data > 1 and mesh.shard == "none":  # DistributedDataParallel lays its buckets out anew
        gradients *= 2
        of_experts *= 2 if mesh.expert == 1 else 1
    layers = max(1, len(spec.sparse_layer_names()))
    products = 3 if spec.activation == "geglu" else 2
    largest = max(experts // layers // products, spec.vocab_size * spec.d_model // mesh.model)
    copies = step.product_bytes * (own.products + experts // layers) if step.product_bytes < FLOAT else 0
    if several:
        copies += largest * (FLOAT + (step.product_bytes if step.product_bytes < FLOAT else 0))
    rows = spec.vocab_size // mesh.model
    return DeviceBytes(
        weights=weights + expert_weights,
        gradients=gradients + of_experts,
        optimizer=state + expert_state,
        copies=copies,
        activations=activation_bytes(spec, step, mesh, microbatch).total + _passing(spec, step, mesh, microbatch),
        dispatch=_dispatch_bytes(spec, step, mesh, microbatch),
        # Two of float32 each: logits and softmax, or half as long logits, softmax and its copy; so with the matrix's.
        vocabulary=2 * FLOAT * rows * (min(CHUNK, microbatch * step.target) + spec.d_model),
    )


def _dense_bytes(mesh: Mesh, own: RankWeights, several: bool) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state outside the experts, see `_sharded`.

    zero3 gathers what is in no block for a whole pass.
    """
    shards = 1 if mesh.shard == "none" else mesh.data
    first, *blocks = own.units
    gathered = FLOAT * (first + 2 * max(blocks)), FLOAT * max(own.units)
    return _sharded(FLOAT * own.dense, own.dense_state, shards, gathered, mesh, several)


def _expert_bytes(mesh: Mesh, own: RankWeights, several: bool) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state of the experts, see `_sharded`."""
    unit = FLOAT * max(own.expert_units, default=0) // mesh.expert
    whole, state = FLOAT * own.expert // mesh.expert, own.expert_state // mesh.expert
    return _sharded(whole, state, own.expert_shards(mesh), (2 * unit, unit), mesh, several)


def _sharded(
    whole: int, state: int, shards: int, gathered: tuple[int, int], mesh: Mesh, several: bool
) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state on a rank that keeps one of `shards` shards.

    As in torch's fully_shard: zero2 keeps a shard beside the whole weights; zero3 gathers a unit at a time, and the
    next one ahead. Gradients are whole until they are scattered: those of a unit; but all of them under zero2, which
    scatters once a step, if there are `several` microbatches.

    `whole` and `state` are the bytes of all weights and of their optimizer state. `gathered` are the bytes of weights
    that zero3 gathers at most, and of gradients that are whole at most.
    """
    if shards == 1:
        return whole, whole, state
    shard, state = -(-whole // shards), -(-state // shards)
    scattered = shard + gathered[1]
    if mesh.shard == "zero2":
        return shard + whole, whole if several else scattered, state
    return shard + gathered[0], scattered, state


def _dispatch_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> int:
    if mesh.expert == 1:
        return 0
    sent = [slots(spec, stack, step, microbatch, mesh.expert).sent for stack in STACKS if spec.sparse_layers(stack)]
    return 2 * step.sent_bytes * max(sent) * max(spec.d_model, *output_widths(spec).values())


def _passing(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> int:
    """Gradients within a block that is computed again: of the widest tensor, behind and before what made it.

    Where nothing is, they take the room of what other blocks have kept.
    """
    widest = 0
    for stack in STACKS if step.recomputed else ():
        length = step.length(stack)
        rows = microbatch * length
        if spec.sparse_layers(stack):
            rows = max(rows, slots(spec, stack, step, microbatch, mesh.expert).rows)
        attended = 0 if step.fused else FLOAT * microbatch * spec.num_heads * length**2
        widest = max(widest, step.product_bytes * rows * spec.d_ff, attended)
    return 2 * widest // mesh.model


def activation_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> ActivationBytes:
    """What autograd keeps of a microbatch of so many sequences on one rank.

    Where blocks are computed again: the inputs of all, which are the residual stream, and all that the largest keeps.
    """
    width = FLOAT * microbatch * spec.d_model
    blocks = {
        (stack, layer): _block(spec, step, mesh, microbatch, stack, layer)
        for stack in STACKS
        for layer in range(spec.num_blocks(stack))
    }
    inputs = 0
    if step.recomputed:
        inputs = sum(width * step.length(stack) for stack, _ in blocks)
        largest = max(blocks, key=lambda place: blocks[place].total - width * step.length(place[0]))
        inputs -= width * step.length(largest[0])  # it is among what it keeps
        blocks = {largest: blocks[largest]}
    # The encoder's output is kept in float32, or a copy for each product that takes it (`_block`).
    memory = 1 if step.product_bytes == FLOAT else 0
    norms = _norm(spec, step, microbatch * step.source, memory) + _norm(spec, step, microbatch * step.target, 0)
    norms += width * step.target  # the loss's gradient of the hidden states
    norms += inputs + (width * step.source if step.recomputed and not memory else 0)
    biases = sum(_learned_bias(spec, step, stack, microbatch, mesh.model) for stack in STACKS)
    return ActivationBytes(*map(sum, zip(ActivationBytes(norms, biases, 0, 0, 0), *blocks.values(), strict=True)))


def _block(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int, stack: Stack, layer: int) -> ActivationBytes:
    """Return what autograd keeps of one block, in bytes."""
    norms = attention = feed_forward = routers = experts = 0
    source, target, tokens = (microbatch * length for length in (step.source, step.target, step.length(stack)))
    for part, readers in (("attention", 3), ("feed_forward", _inputs(spec))):
        sparse = spec.is_sparse(stack, layer, part)  # type: ignore[arg-type] # of the two names above
        norms += _norm(spec, step, tokens, 0 if sparse else readers)
        if sparse:
            places = slots(spec, stack, step, microbatch, mesh.expert)
            routers += _router(spec, step, stack, tokens)
            experts += _experts(spec, step, places, output_widths(spec)[part], mesh.model)
        elif part == "feed_forward":
            feed_forward += step.product_bytes * tokens * _hidden(spec, spec.dropout) * spec.d_ff // mesh.model
    attention += _self_attention(spec, step, microbatch, step.length(stack), mesh.model)
    if stack == "decoder":
        norms += _norm(spec, step, target, 1)
        attention += _cross_attention(spec, step, source, target, mesh.model)
        if step.product_bytes < FLOAT:
            norms += 2 * step.product_bytes * source * spec.d_model
    return ActivationBytes(norms, attention, feed_forward, routers, experts)


def _norm(spec: ModelSpec, step: Step, tokens: int, readers: int) -> int:
    """Its input, which is the residual stream, 1 / RMS, and its output.

    Off CUDA the normed input too. The output is kept once in float32; in bfloat16 each of the `readers`, the products
    that take it, has a copy.
    """
    inputs = FLOAT * (1 if step.fused else 2) * spec.d_model + FLOAT
    copies = min(readers, 1) if step.product_bytes == FLOAT else readers
    return tokens * (inputs + copies * step.product_bytes * spec.d_model)


def _inputs(spec: ModelSpec) -> int:
    """Products that a feed-forward begins with."""
    return 2 if spec.activation == "geglu" else 1


def _hidden(spec: ModelSpec, dropout: float) -> int:
    """Tensors of F hidden units: ReLU's result and, after dropout, its product; both inputs of GEGLU, GELU, product."""
    return 4 if spec.activation == "geglu" else 1 + (dropout > 0.0)


def _self_attention(spec: ModelSpec, step: Step, sequences: int, length: int, model: int) -> int:
    """Queries, keys, values and their mix; sums of the softmax, or off CUDA the weights [B, H, N, S] in float32 with
    their copy in bfloat16, and queries and keys in float32: a bias that learns has no fused kernel there."""
    c, heads = step.product_bytes, spec.num_heads // model
    tokens, width = sequences * length, heads * spec.head_width
    if step.fused:
        return tokens * (4 * c * width + FLOAT * heads)
    weights = FLOAT + (c if c < FLOAT else 0)
    return tokens * (width * (2 * FLOAT + 2 * c) + heads * length * weights)


def _cross_attention(spec: ModelSpec, step: Step, source: int, target: int, model: int) -> int:
    heads = spec.num_heads // model
    return 2 * step.product_bytes * heads * spec.head_width * (source + target) + FLOAT * heads * target


def _learned_bias(spec: ModelSpec, step: Step, stack: Stack, sequences: int, model: int) -> int:
    """Buckets of distance; on CUDA the bias of a stack, its gradient in one block, and the sum of those so far.

    On a CPU it is kept as an input of blocks alone: the encoder's hides padding and is each sequence's own.
    """
    length, heads = step.length(stack), spec.num_heads // model
    bias = 3 * sequences * heads * step.product_bytes if step.fused else 0
    if step.recomputed and not step.fused:
        bias = FLOAT * heads * (sequences if stack == "encoder" else 1)
    return length**2 * (8 + bias)


def _router(spec: ModelSpec, step: Step, stack: Stack, tokens: int) -> int:
    """Jitter and the input times it, or the input; the softmax, once more and its logarithm in float32; indices."""
    width = step.router_bytes * spec.d_model * (2 if spec.router_of(stack).jitter else 1)
    return tokens * (width + spec.num_experts * (step.router_bytes + 2 * FLOAT) + 64)


def _experts(spec: ModelSpec, step: Step, places: Slots, width: int, model: int) -> int:
    """Rows, hidden units, outputs; a mask where there is dropout; indices."""
    dropout = spec.experts_dropout
    hidden = (_hidden(spec, dropout) + (dropout > 0.0)) * spec.d_ff // model
    return places.rows * (step.product_bytes * (spec.d_model + hidden + width + 1) + 25)
