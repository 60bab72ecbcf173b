"""The collectives of a training step on one rank of a mesh: kind, axis, how often, bytes (paper section 5).

Legend: G groups of a rank's microbatch, E experts, C slots, D model, O outputs.

Rules: to sum over a divided dim costs an all-reduce forward and one backward; tokens reach the experts by an all-to-all
each way, mirrored backward, of E * G * C rows, as many for any number of experts at a fixed capacity factor but for the
rounding of C and its least number. Where blocks are computed again, what they send forward is sent twice. Counts of
targets, norms and metrics, a few numbers a step, are left out, as are Adafactor's sums over divided rows and columns.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple

from switchcli.model.config import STACKS, ModelSpec
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Step, output_widths, slots

Kind = Literal["all_reduce", "all_to_all", "all_gather", "reduce_scatter"]
Axis = Literal["data", "expert", "replica", "model"]
"""`expert` and `replica` are parts of the data axis: ranks that hold other experts, and those that hold the same."""


class Collective(NamedTuple):
    """One kind of call, which every rank makes in a step."""

    kind: Kind
    axis: Axis
    ranks: int
    """Ranks that take part."""
    what: str
    calls: int
    """In a step; the parts in which a gradient is summed count as one."""
    payload_bytes: int
    """What one rank hands to one call: of an all-gather its own shard."""

    @property
    def network_bytes(self) -> int:
        """What leaves a rank in a step, by the ring where there is one."""
        ways = {"all_reduce": 2.0, "all_to_all": 1.0, "reduce_scatter": 1.0, "all_gather": float(self.ranks)}
        return round(self.calls * self.payload_bytes * ways[self.kind] * (self.ranks - 1) / self.ranks)


def collectives(spec: ModelSpec, step: Step, mesh: Mesh, own: RankWeights, microbatch: int) -> tuple[Collective, ...]:
    """All of a step with microbatches of so many sequences; `own` is `held` for the model axis."""
    microbatches = step.sequences // mesh.data // microbatch
    found = [
        *_gradients(mesh, own, microbatches),
        *_tokens(spec, step, mesh, microbatch, microbatches),
        *_model_axis(spec, step, mesh, microbatch, microbatches),
    ]
    return tuple(each for each in found if each.ranks > 1 and each.calls and each.payload_bytes)


def _gradients(mesh: Mesh, own: RankWeights, microbatches: int) -> Iterator[Collective]:
    """Once a step, after its last microbatch; zero3 gathers and scatters in each of them.

    fully_shard keeps what is in no block, the first unit, from the forward pass on: it is gathered once. To compute a
    block again gathers nothing more: it is there for its way back.
    """
    data = mesh.data
    reduced = 1 if mesh.shard != "zero3" else microbatches  # times a step; zero3 gathers twice as often
    if mesh.shard == "none":
        yield Collective("all_reduce", "data", data, "dense gradients", 1, FLOAT * own.dense)
    else:
        gathers = Counter({own.units[0]: reduced})
        gathers.update([*own.units[1:]] * (reduced if mesh.shard == "zero2" else 2 * reduced))
        for unit, count in gathers.items():
            shard = -(-FLOAT * unit // data)
            yield Collective("all_gather", "data", data, "dense weights", count, shard)
        for unit, count in Counter(own.units).items():
            yield Collective("reduce_scatter", "data", data, "dense gradients", count * reduced, FLOAT * unit)
    axis: Axis = "data" if mesh.expert == 1 else "replica"
    shards = own.expert_shards(mesh)
    if shards == 1:
        experts = FLOAT * own.expert // mesh.expert
        yield Collective("all_reduce", axis, mesh.replicas, "expert gradients", 1, experts)
        return
    for unit, layers in Counter(own.expert_units).items():
        payload, count = FLOAT * unit // mesh.expert, layers * reduced
        gathered = count if mesh.shard == "zero2" else 2 * count
        yield Collective("all_gather", axis, mesh.replicas, "expert weights", gathered, payload // shards)
        yield Collective("reduce_scatter", axis, mesh.replicas, "expert gradients", count, payload)


def _tokens(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int, microbatches: int) -> Iterator[Collective]:
    """The way there and back, forward and backward. With a slot for every token the numbers of rows go first, int64."""
    forward = _forward(step) * microbatches
    for stack in STACKS:
        if mesh.expert == 1 or not (layers := len(spec.sparse_layers(stack))):
            continue
        places = slots(spec, stack, step, microbatch, mesh.expert)
        rows = step.sent_bytes * places.sent
        calls, name = layers * (forward + microbatches), f"{stack} tokens"
        for part, width in output_widths(spec).items():
            of = name if spec.sparse == "feed_forward" else f"{name} of {part}"
            yield Collective("all_to_all", "expert", mesh.expert, f"{of}, there", calls, rows * spec.d_model)
            yield Collective("all_to_all", "expert", mesh.expert, f"{of}, back", calls, rows * width)
        if spec.experts_dropout:
            sent = 8 * places.sent
            masks = step.product_bytes * microbatch * spec.d_ff // mesh.model
            calls, of = len(output_widths(spec)) * layers * forward, f"{stack} dropout"
            yield Collective("all_to_all", "expert", mesh.expert, f"{of}, whose rows", calls, sent)
            yield Collective("all_gather", "expert", mesh.expert, f"{of}, masks", calls, masks)
        if places.counted:
            calls = len(output_widths(spec)) * layers * forward
            yield Collective("all_to_all", "expert", mesh.expert, f"{stack} counts", calls, 8 * spec.num_experts)


def _forward(step: Step) -> int:
    """How often a block's forward pass is done."""
    return 2 if step.recomputed else 1


def _model_axis(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int, microbatches: int) -> Iterator[Collective]:
    """Yield the sums over the model axis: [tokens, D] of each attention and feed-forward both ways, and the loss.

    The gradient of the encoder's output is summed once for all cross-attentions. Embeddings are float32, as are two
    numbers a target, the largest logit and the sum, and the gradients of what experts' outputs are weighed with.
    Without dropout a dense block that is computed again leaves out its last sum; it counts all the same.
    """
    model = mesh.model
    for stack in STACKS:
        blocks, tokens = spec.num_blocks(stack), microbatch * step.length(stack)
        parts = 3 if stack == "decoder" else 2
        payload = step.sent_bytes * tokens * spec.d_model
        calls = (_forward(step) + 1) * parts * blocks * microbatches
        yield Collective("all_reduce", "model", model, f"{stack} layers", calls, payload)
        embedded = FLOAT * tokens * spec.d_model
        yield Collective("all_reduce", "model", model, f"{stack} embedding", microbatches, embedded)
        if layers := len(spec.sparse_layers(stack)):
            rule = spec.router_of(stack)
            slots_of_group = spec.num_experts * slots(spec, stack, step, microbatch, mesh.expert).capacity
            gates = max(step.router_bytes, step.comm_bytes or 0) * slots_of_group * microbatch // rule.group_sequences
            yield Collective("all_reduce", "model", model, f"{stack} gates", layers * microbatches, gates)
    memory = step.sent_bytes * microbatch * step.source * spec.d_model
    yield Collective("all_reduce", "model", model, "gradient of the encoder's output", microbatches, memory)
    targets = microbatch * step.target
    yield Collective("all_reduce", "model", model, "loss", 2 * microbatches, FLOAT * targets)
    hidden = step.sent_bytes * targets * spec.d_model
    yield Collective("all_reduce", "model", model, "gradient of hidden states", microbatches, hidden)
