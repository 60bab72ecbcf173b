"""Memory of one device in a training step, in bytes: weights, gradients, optimizer state, activations and buffers.

Legend: B sequences, T queries and S keys of a sequence, D model, F hidden, H heads, K head size, E experts, A rows,
O outputs, V vocabulary.

Weights, gradients and optimizer state are float32. Matrix products are float32 or bfloat16: `Step.product_bytes`, c in
the comments. Activations are what autograd keeps between the forward and the backward pass. They are added up layer by
layer from the code of `switchcli.model`, and tests/planner/test_memory_use.py compares them with what autograd keeps.

The sum is an upper bound of the peak, because gradients grow while activations are freed.

Not modeled: workspaces of kernels, fragmentation, buffers of collectives other than those of dispatched tokens, input
dropout, packed rows, torch.compile, a teacher, the gathered matrices and products of Muon. Weights that are not trained
(`update`) count as if they were.
"""

from typing import NamedTuple

from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.moe.experts import CPU_CACHE
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Slots, Step, output_widths, slots

CHUNK = 1024
"""Targets whose logits exist at a time (training/loss.py)."""


class DeviceBytes(NamedTuple):
    """Memory of one device at the end of a forward pass, in bytes."""

    weights: int
    gradients: int
    """Twice the gradients that DistributedDataParallel sums, if there are several microbatches: in the first step it
    replaces its buckets while the old ones are full."""
    optimizer: int
    copies: int
    """Copies of weights in bfloat16: of the dense ones until the backward pass, of the experts one layer at a time, or
    on a CPU one matrix at a time if they are large. With several microbatches, also the largest gradient of one before
    it is added to that of the others."""

    activations: int
    dispatch: int
    """Tokens on their way to the experts of other ranks and back: send and receive buffer."""
    vocabulary: int
    """Logits of a chunk with their gradient, and the gradient of the softmax matrix, computed in the forward pass."""

    @property
    def total(self) -> int:
        return sum(self)


class _TrainedBytes(NamedTuple):
    """Bytes of weights, their gradients and their optimizer state on one device."""

    weights: int
    gradients: int
    optimizer: int


def device_bytes(spec: ModelSpec, step: Step, mesh: Mesh, weights: RankWeights, microbatch: int) -> DeviceBytes:
    """Return the memory of a device with microbatches of `microbatch` sequences.

    `weights` are `rank_weights` for the model axis of `mesh`.
    """
    accumulates = step.sequences // mesh.data // microbatch > 1  # microbatches of a rank
    dense = _dense_bytes(mesh, weights, accumulates)
    experts = _expert_bytes(mesh, weights, accumulates)
    dense_gradients, expert_gradients = dense.gradients, experts.gradients
    if accumulates and mesh.data > 1 and mesh.shard == "none":
        dense_gradients *= 2
        if mesh.expert == 1:  # else ExpertGradients sums them, in place
            expert_gradients *= 2
    return DeviceBytes(
        weights=dense.weights + experts.weights,
        gradients=dense_gradients + expert_gradients,
        optimizer=dense.optimizer + experts.optimizer,
        copies=copy_bytes(spec, step, mesh, weights, accumulates),
        activations=activation_bytes(spec, step, mesh, microbatch)
        + _recomputed_gradient_bytes(spec, step, mesh, microbatch),
        dispatch=_dispatch_bytes(spec, step, mesh, microbatch),
        vocabulary=_vocabulary_bytes(spec, step, mesh, microbatch),
    )


def _dense_bytes(mesh: Mesh, weights: RankWeights, accumulates: bool) -> _TrainedBytes:
    """Return the bytes of weights, gradients and optimizer state outside the experts."""
    outside_blocks, *blocks = weights.units
    # zero3 gathers the weights outside the blocks for a whole pass, one block, and the next block ahead.
    gathered = FLOAT * (outside_blocks + 2 * max(blocks))
    parameters, state = weights.dense_shard(mesh)
    return _sharded_bytes(
        mesh, FLOAT * weights.dense, FLOAT * parameters, state, gathered, FLOAT * max(weights.units), accumulates
    )


def _expert_bytes(mesh: Mesh, weights: RankWeights, accumulates: bool) -> _TrainedBytes:
    """Return the bytes of weights, gradients and optimizer state of the experts."""
    unit = FLOAT * max(weights.expert_units, default=0) // mesh.expert
    weight_bytes, state_bytes = FLOAT * weights.expert // mesh.expert, weights.expert_state_shard(mesh)
    shard = weight_bytes // weights.expert_shards(mesh)
    # zero3 gathers the experts of one layer, and those of the next layer ahead.
    return _sharded_bytes(mesh, weight_bytes, shard, state_bytes, 2 * unit, unit, accumulates)


def _sharded_bytes(
    mesh: Mesh, weights: int, shard: int, state: int, gathered: int, gradient_unit: int, accumulates: bool
) -> _TrainedBytes:
    """Return the bytes on a rank that keeps a shard of the weights, as fully_shard does.

    Example: weights of 100 MB, a shard of 25 MB with a state of 12.5 MB (`none`: of 100 MB with 50 MB), `gathered` 20
    MB, `gradient_unit` 10 MB:

    | shard | weights  | gradients                           | state |
    |-------|----------|-------------------------------------|-------|
    | none  | 100      | 100                                 | 50    |
    | zero2 | 25 + 100 | 25 + 10; 100 if they are accumulated | 12.5  |
    | zero3 | 25 + 20  | 25 + 10                             | 12.5  |

    Args:
        mesh: its `shard` says what is sharded.
        weights: bytes of all weights that the ranks divide.
        shard: bytes of those that the rank keeps: all of them if they are not sharded.
        state: bytes of the optimizer state of the shard.
        gathered: bytes of weights that zero3 gathers at the same time.
        gradient_unit: bytes of the gradients of the largest unit, which exist in full until they are scattered.
        accumulates: whether a step has several microbatches.
    """
    if shard == weights:
        return _TrainedBytes(weights, weights, state)
    gradients = shard + gradient_unit
    if mesh.shard == "zero2":
        # All units stay gathered beside the shard. Gradients are scattered once a step: until then those of several
        # microbatches are added in full.
        return _TrainedBytes(shard + weights, weights if accumulates else gradients, state)
    return _TrainedBytes(shard + gathered, gradients, state)


def copy_bytes(spec: ModelSpec, step: Step, mesh: Mesh, weights: RankWeights, accumulates: bool) -> int:
    """Return the bytes of weights in bfloat16, and of one gradient that is about to be accumulated.

    Example: 8 experts with two stacks of [512, 2048] each, and a softmax matrix of 32128 x 512, in bfloat16 on a GPU.
    Of a layer 2 * 8 * 512 * 2048 = 16.8 M weights are copied, beside the dense matrices: 33.6 MB. The largest gradient
    is that of the softmax matrix, 16.4 M elements, where a stack has 8.4 M: 65.8 MB in float32 and 32.9 MB in bfloat16.
    """
    is_rounded = step.product_bytes < FLOAT
    num_layers = max(1, len(spec.sparse_layer_names()))
    experts_of_layer = weights.expert // mesh.expert // num_layers
    stack = experts_of_layer // (_num_input_products(spec) + 1)  # and one output product
    if _is_one_expert_at_a_time(spec, step, mesh):
        experts_of_layer = stack = stack * mesh.expert // spec.num_experts  # only one matrix is copied
    num_bytes = step.product_bytes * (weights.products + experts_of_layer) if is_rounded else 0
    if accumulates:
        largest = max(stack, spec.vocab_size * spec.d_model // mesh.model)
        num_bytes += largest * (FLOAT + (step.product_bytes if is_rounded else 0))
    return num_bytes


def _is_one_expert_at_a_time(spec: ModelSpec, step: Step, mesh: Mesh) -> bool:
    """Return whether a CPU computes one expert at a time (kernels/cpu_experts.py), as stacks do not fit into its cache.

    With oneDNN it does so for smaller stacks too, and then keeps less than is planned.
    """
    stack = spec.num_experts * spec.expert_width * spec.d_model // (mesh.expert * mesh.model)
    return not step.fused and stack * step.product_bytes > CPU_CACHE


def _dispatch_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> int:
    """Return the bytes of the two buffers of the largest all-to-all: [rows, D] to the experts, [rows, O] back."""
    if mesh.expert == 1:
        return 0
    max_rows = max(slots(spec, stack, step, microbatch, mesh.expert).sent_rows for stack in spec.sparse_stacks)
    return 2 * step.product_bytes * max_rows * max(spec.d_model, *output_widths(spec).values())


def _vocabulary_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> int:
    """Return the bytes of the logits of a chunk, [chunk, V / m], and of the softmax matrix's gradient, [V / m, D].

    Both take 8 bytes an element. In float32: logits and softmax; the gradient, and what one chunk adds to it. In
    bfloat16: logits, float32 softmax and its bfloat16 copy; the float32 gradient, what a chunk adds, and the matrix.
    """
    chunk = min(CHUNK, microbatch * step.target)
    return 2 * FLOAT * (spec.vocab_size // mesh.model) * (chunk + spec.d_model)


def _recomputed_gradient_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> int:
    """Return the bytes of the gradients within a block that is recomputed in the backward pass.

    They are two gradients of the widest tensor's size: that of a tensor, and that of what it was computed from. Without
    recomputation they count 0, because they take the place of activations of later blocks, which are freed by then.
    """
    widest = 0
    for stack in STACKS if step.recomputed else ():
        length = step.length(stack)
        rows = microbatch * length
        if spec.sparse_layers(stack):
            rows = max(rows, slots(spec, stack, step, microbatch, mesh.expert).expert_rows)
        hidden = step.product_bytes * rows * max(spec.d_ff, spec.expert_width)  # [rows, F], at most
        # [B, H, T, S], at most: a CPU computes them in chunks, whose size depends on its threads.
        attention_weights = 0 if step.fused else FLOAT * microbatch * spec.num_heads * length**2
        widest = max(widest, hidden, attention_weights)
    return 2 * widest // mesh.model


def activation_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> int:
    """Return the bytes that autograd keeps of a microbatch of `microbatch` sequences on one rank.

    If blocks are recomputed, this is the input of each block, and everything that the largest block keeps.
    """
    position = FLOAT * microbatch * spec.d_model  # [B, D] in float32: one position of the residual stream
    blocks = {
        (stack, layer): _block_bytes(spec, step, mesh, microbatch, stack, layer)
        for stack in STACKS
        for layer in range(spec.num_blocks(stack))
    }
    block_inputs = 0
    if step.recomputed:
        block_inputs = sum(position * step.length(stack) for stack, _ in blocks)
        # The input of a block is among what its first norm keeps: it counts once.
        largest = max(blocks, key=lambda block: blocks[block] - position * step.length(block[0]))
        block_inputs -= position * step.length(largest[0])
        blocks = {largest: blocks[largest]}
    # The encoder's output is kept once in float32. In bfloat16 cross-attention keeps copies of it (`_block_bytes`);
    # recomputed blocks keep it in float32 as their input all the same.
    is_float32 = step.product_bytes == FLOAT
    outside_blocks = _norm(spec, step, microbatch * step.source, 1 if is_float32 else 0)
    outside_blocks += _norm(spec, step, microbatch * step.target, 0)
    outside_blocks += position * step.target  # gradient of the hidden states, which the loss computes forward
    outside_blocks += block_inputs
    if step.recomputed and not is_float32:
        outside_blocks += position * step.source
    biases = sum(_position_bias(spec, step, stack, microbatch, mesh.model) for stack in STACKS)
    return outside_blocks + biases + sum(blocks.values())


def _block_bytes(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int, stack: Stack, layer: int) -> int:
    """Return the bytes that autograd keeps of one block."""
    kept = _self_attention(spec, step, microbatch, step.length(stack), mesh.model)
    source, target, tokens = (microbatch * length for length in (step.source, step.target, step.length(stack)))
    # A norm's output is read by queries, keys and values, or by the first products of the feed-forward.
    for part, num_readers in (("attention", 3), ("feed_forward", _num_input_products(spec))):
        is_sparse = spec.is_sparse(stack, layer, part)  # type: ignore[arg-type] # of the two names above
        d_ff = 0  # hidden units of a dense feed-forward, which may stand beside experts
        if part == "feed_forward":
            d_ff = spec.shared_d_ff if is_sparse else spec.d_ff
        kept += _norm(spec, step, tokens, 0 if is_sparse and not d_ff else num_readers, mesh.model)
        num_hidden = _num_hidden_tensors(spec, spec.dropout)
        kept += step.product_bytes * tokens * num_hidden * d_ff // mesh.model
        if is_sparse:
            layer_slots = slots(spec, stack, step, microbatch, mesh.expert)
            kept += _router(spec, step, stack, tokens)
            kept += _experts(spec, step, layer_slots, output_widths(spec)[part], mesh)
    if stack == "decoder":
        kept += _norm(spec, step, target, 1, mesh.model)  # before cross-attention, read by the queries
        kept += _cross_attention(spec, step, source, target, mesh.model)
        if step.product_bytes < FLOAT:
            # The encoder's output, for keys and for values; a region of the model axis casts it once.
            kept += (2 if mesh.model == 1 else 1) * step.product_bytes * source * spec.d_model
    return kept


def _norm(spec: ModelSpec, step: Step, tokens: int, num_readers: int, model: int = 1) -> int:
    """Return the bytes kept of an RMS norm: its input, 1 / RMS, and its output.

    The input is the float32 residual stream. The output is kept once if products are float32. In bfloat16 each of the
    `num_readers` products that read it keeps its own copy, unless they form a region of the model axis, which casts
    once.
    """
    inputs = FLOAT * spec.d_model + FLOAT
    copies = min(num_readers, 1) if step.product_bytes == FLOAT or model > 1 else num_readers
    return tokens * (inputs + copies * step.product_bytes * spec.d_model)


def _num_input_products(spec: ModelSpec) -> int:
    """Return the number of products that read the input of a feed-forward: two with GEGLU."""
    return 2 if spec.activation == "geglu" else 1


def _num_hidden_tensors(spec: ModelSpec, dropout: float) -> int:
    """Return the number of [tokens, F] tensors that autograd keeps of a feed-forward.

    With ReLU: its output, and the output of dropout. With GEGLU: both of its inputs, GELU(gate), and their product.
    """
    return 4 if spec.activation == "geglu" else 1 + (dropout > 0.0)


def _self_attention(spec: ModelSpec, step: Step, sequences: int, length: int, model: int) -> int:
    """Return the bytes kept of self-attention on one rank, between its input and its output projection."""
    c, heads = step.product_bytes, spec.num_heads // model
    tokens, width = sequences * length, heads * spec.head_width
    if step.fused:
        # Queries, keys, values and the output, [tokens, H * K]; the softmax's logarithm of the sum, [tokens, H].
        return tokens * (4 * c * width + FLOAT * heads)
    # A trained bias has no fused kernel on a CPU: the attention weights [B, H, T, S] are kept, in the dtype of values.
    return tokens * c * (4 * width + heads * length)


def _cross_attention(spec: ModelSpec, step: Step, source: int, target: int, model: int) -> int:
    """Return the bytes kept of cross-attention: queries and output, keys and values, [tokens, H * K] each; see above.

    Its bias is a mask and not trained: the kernel is fused on every device. `source` and `target` count tokens.
    """
    heads = spec.num_heads // model
    return 2 * step.product_bytes * heads * spec.head_width * (source + target) + FLOAT * heads * target


def _position_bias(spec: ModelSpec, step: Step, stack: Stack, sequences: int, model: int) -> int:
    """Return the bytes of a stack's position bias: bucket indices [T, S] in int64, and biases [B, H, T, S].

    On CUDA: the bias, its gradient in one block, and the sum of the gradients so far, in the dtype of products. On a
    CPU the bias is kept only as an input of recomputed blocks, in float32 and without a batch dim.

    Example: 8 sequences of 512 tokens, 12 heads, bfloat16: on CUDA 512**2 * (8 + 3 * 8 * 12 * 2) = 153 MB.
    """
    length, heads = step.length(stack), spec.num_heads // model
    bias = 0
    if step.fused:
        bias = 3 * sequences * heads * step.product_bytes
    elif step.recomputed:
        bias = FLOAT * heads
    return length**2 * (8 + bias)


def _router(spec: ModelSpec, step: Step, stack: Stack, tokens: int) -> int:
    """Return the bytes kept of a router: input, probabilities, and the assignment.

    With jitter the noise [tokens, D] is kept as well. Of size [tokens, E] are the softmax, and in float32 once more the
    softmax and its logarithm. Choices, positions and weights take about 64 bytes a token.

    Example: D = 512, E = 8, a float32 router with jitter: 4 * 512 * 2 + 8 * (4 + 8) + 64 = 4,256 bytes a token.
    """
    inputs = step.router_bytes * spec.d_model * (2 if spec.router_of(stack).jitter else 1)
    per_expert = step.router_bytes + 2 * FLOAT
    if spec.router_of(stack).has_sigmoid_gates:  # the logits, and what a CPU keeps of the logarithm of a sigmoid
        per_expert += FLOAT if step.fused else 2 * FLOAT
    return tokens * (inputs + spec.num_experts * per_expert + 64)


def _experts(spec: ModelSpec, step: Step, layer_slots: Slots, width: int, mesh: Mesh) -> int:
    """Return the bytes kept of the experts' rows: input [A, D], hidden vectors [A, F / m], output [A, O = `width`].

    With dropout the mask [A, F / m] is kept as well. Weight and indices take about 25 bytes a row, and one element in
    the dtype of products. A CPU that computes one expert at a time keeps what the activation gets, one tensor for each
    product that reads the input, and computes the hidden vectors again.

    Example: D = O = 512, F = 2048, ReLU without dropout, bfloat16: 2 * (512 + 2048 + 512 + 1) + 25 = 6,171 bytes a row.
    """
    dropout = spec.experts_dropout
    again = _is_one_expert_at_a_time(spec, step, mesh)
    num_hidden = _num_input_products(spec) if again else _num_hidden_tensors(spec, dropout)
    hidden = (num_hidden + (dropout > 0.0)) * spec.expert_width // mesh.model
    return layer_slots.expert_rows * (step.product_bytes * (spec.d_model + hidden + width + 1) + 25)
