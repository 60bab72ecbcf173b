"""Which meshes a training step fits, and how long it takes on each: arithmetic alone, no device and no process group.

A mesh is refused by a rule (sizes that do not divide, a batch that cannot be shared) or by the memory of a device. The
others are ranked by an estimate of the step's time: products at the given rate, or the weights' way through the
device's memory where that takes longer; then each collective, one after the other. Nothing overlaps in it and no call
has a latency. It is to compare meshes, not to promise a time.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from switchcli.distributed.mesh import Shard, divides_experts, indivisible_sizes
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import FORWARD_AND_BACKWARD, count
from switchcli.planner.memory_use import DeviceBytes, device_bytes
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Step, output_widths, slots
from switchcli.planner.traffic import Collective, collectives

GIB = 2**30
SHARDS: tuple[Shard, ...] = ("none", "zero2", "zero3")


class Machine(NamedTuple):
    """The devices; every rate is one device's, a second."""

    devices: int
    memory_bytes: int
    flops: float = 312e12
    memory_bandwidth: float = 2e12
    bandwidth: float = 300e9
    """Bytes to the other devices of its node."""
    network: float = 25e9
    """Bytes to other nodes."""
    node_devices: int = 8

    def rate(self, collective: Collective, mesh: Mesh) -> float:
        """Ranks of the model axis lie side by side, then those of an expert group, then the rest of the data axis."""
        inner = {"model": 1, "expert": mesh.model, "replica": mesh.model * mesh.expert, "data": mesh.model}
        inside = collective.ranks * inner[collective.axis] <= self.node_devices
        return self.bandwidth if inside else self.network


class Fit(NamedTuple):
    """A mesh that the step fits."""

    mesh: Mesh
    microbatch: int
    """Sequences: the most that fit, where the recipe leaves it open."""
    bytes: DeviceBytes
    collectives: tuple[Collective, ...]
    seconds: dict[str, float]
    """Seconds of compute, of memory, and of the collectives of each axis."""

    @property
    def step_seconds(self) -> float:
        apart = max(self.seconds["compute"], self.seconds["memory"])
        return apart + sum(time for name, time in self.seconds.items() if name not in ("compute", "memory"))

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


class Rejection(NamedTuple):
    """A mesh that it does not fit, and why, in words with the numbers."""

    mesh: Mesh
    kind: Literal["rule", "batch", "memory"]
    reason: str
    bytes_needed: int = 0
    """Where memory is the reason."""


class Plan(NamedTuple):
    fits: tuple[Fit, ...]
    """The fastest first."""
    rejected: tuple[Rejection, ...]

    def reasons(self) -> list[tuple[str, int]]:
        """Return why meshes are refused, and how many for each reason; memory last, what needs least of it first.

        The ways to shard one mesh that does not fit in memory are one reason: that of the way which needs least.
        """
        counts: dict[object, tuple[str, int]] = {}
        for one in sorted(self.rejected, key=lambda one: (one.kind == "memory", one.bytes_needed)):
            key = one.mesh._replace(shard="none") if one.kind == "memory" else one.reason
            words = f"{one.mesh}: {one.reason}" if one.kind == "memory" else one.reason
            first, meshes = counts.get(key, (words, 0))
            counts[key] = (first, meshes + 1)
        return list(counts.values())


def plan(
    spec: ModelSpec, step: Step, machine: Machine, microbatch: int | None, held_by: Mapping[int, RankWeights]
) -> Plan:
    """Every mesh of the machine's devices. `held_by` has `held` for each model axis of `model_axes`.

    `microbatch` counts sequences; None leaves the choice to the plan.
    """
    fits, refused = [], []
    for mesh in meshes(spec, machine.devices):
        if broken := mesh_violation(spec, mesh) or batch_violation(spec, step, mesh, microbatch):
            refused.append(broken)
            continue
        own, share = held_by[mesh.model], step.sequences // mesh.data
        sizes = [microbatch] if microbatch else microbatch_sizes(share, spec.group_sequences)
        needed = {size: device_bytes(spec, step, mesh, own, size) for size in sizes}
        size = next((size for size in sizes if needed[size].total <= machine.memory_bytes), None)
        if size is None:
            refused.append(_too_much(mesh, needed[sizes[-1]], machine, sizes[-1]))
            continue
        calls = collectives(spec, step, mesh, own, size)
        fits.append(Fit(mesh, size, needed[size], calls, _seconds(spec, step, machine, mesh, own, size, calls)))
    return Plan(tuple(sorted(fits, key=lambda fit: (fit.step_seconds, fit.bytes.total))), tuple(refused))


def meshes(spec: ModelSpec, devices: int) -> Iterator[Mesh]:
    """Every data x model of so many devices, with the experts over each part of the data axis."""
    for model in divisors(devices):
        data = devices // model
        for expert in divisors(data) if spec.num_experts > 1 else [1]:
            for shard in SHARDS if data > 1 else SHARDS[:1]:
                yield Mesh(data, expert, model, shard)


def model_axes(spec: ModelSpec, devices: int) -> list[int]:
    """The model axes that the model's sizes allow."""
    return [model for model in divisors(devices) if mesh_violation(spec, Mesh(devices // model, 1, model)) is None]


def divisors(number: int) -> list[int]:
    """In order."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def microbatch_sizes(share: int, group: int) -> list[int]:
    """Sequences that a microbatch may have, of a rank's share in whole groups; the most first."""
    return [size * group for size in reversed(divisors(share // group))]


def mesh_violation(spec: ModelSpec, mesh: Mesh) -> Rejection | None:
    """The model's sizes against the axes."""
    for key, size in indivisible_sizes(spec, mesh.model):
        return Rejection(mesh, "rule", f"{key} ({size}) must be a multiple of the model axis ({mesh.model})")
    if not divides_experts(spec, mesh.model):
        return Rejection(mesh, "rule", f"a model axis ({mesh.model}) does not divide experts of an attention")
    if spec.num_experts % mesh.expert:
        reason = f"model.num_experts ({spec.num_experts}) must be a multiple of the expert axis ({mesh.expert})"
        return Rejection(mesh, "rule", reason)
    return None


def batch_violation(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int | None) -> Rejection | None:
    """The batch against the data axis."""
    share, rest = divmod(step.sequences, mesh.data)
    ranks, group = f"{mesh.data} ranks of the data axis", spec.group_sequences
    reason = None
    if rest or not share:
        reason = f"train.batch_tokens holds {step.sequences} sequences, which {ranks} cannot share evenly"
    elif share % group:
        reason = f"{share} sequences on each of {ranks} are no whole groups of {group} (model.router.group_sequences)"
    elif microbatch and share % microbatch:
        reason = f"train.microbatch_tokens, {microbatch} sequences, must divide the {share} on each of {ranks}"
    return None if reason is None else Rejection(mesh, "batch", reason)


def _too_much(mesh: Mesh, needed: DeviceBytes, machine: Machine, size: int) -> Rejection:
    parts = ", ".join(f"{name} {value / GIB:.3g}" for name, value in needed._asdict().items() if value)
    total, there = f"{needed.total / GIB:.3g} GiB", f"{machine.memory_bytes / GIB:.3g} GiB"
    reason = f"needs {total} a device, which has {there}, with {size} sequences a microbatch: {parts}"
    return Rejection(mesh, "memory", reason, needed.total)


def flops_of(spec: ModelSpec, step: Step, mesh: Mesh, microbatch: int) -> float:
    """Products of a device in a step, forward and backward, and again where blocks are computed again: not the logits.

    Those of `count`, with the rows that the experts do compute instead of one expert a token, and the routers' own,
    which every rank of the model axis takes.
    """
    sequences = step.sequences / mesh.data
    counted = count(spec, step.source, step.target)
    forward = counted.flops * sequences
    routing = 0.0
    experts = spec.num_experts * sum(len(spec.sparse_layers(stack)) for stack in STACKS)
    for stack in STACKS:
        if layers := len(spec.sparse_layers(stack)):
            tokens = step.length(stack) * sequences
            chosen = tokens * spec.router_of(stack).experts_per_token
            rows = slots(spec, stack, step, microbatch, mesh.expert).rows * sequences / microbatch
            forward += 2 * layers * (rows - chosen) * counted.expert / experts
            routing += 2 * layers * len(output_widths(spec)) * tokens * spec.num_experts * spec.d_model
    again = forward - 2 * spec.vocab_size * spec.d_model * step.target * sequences if step.recomputed else 0.0
    routing *= FORWARD_AND_BACKWARD + step.recomputed
    return (FORWARD_AND_BACKWARD * forward + again) / mesh.model + routing


def _seconds(
    spec: ModelSpec,
    step: Step,
    machine: Machine,
    mesh: Mesh,
    own: RankWeights,
    microbatch: int,
    calls: tuple[Collective, ...],
) -> dict[str, float]:
    """A weight is read forward (perhaps twice) and backward and its gradient written in each microbatch; the optimizer
    reads both twice and writes the weight."""
    experts, microbatches = own.expert / mesh.expert, step.sequences // mesh.data // microbatch
    updated = experts / own.expert_shards(mesh) + own.dense / (1 if mesh.shard == "none" else mesh.data)
    moved = FLOAT * ((3 + step.recomputed) * microbatches * (own.dense + experts) + 5 * updated)
    seconds = {
        "compute": flops_of(spec, step, mesh, microbatch) / machine.flops,
        "memory": moved / machine.memory_bandwidth,
    }
    for call in calls:
        name = f"{call.axis} axis"
        seconds[name] = seconds.get(name, 0.0) + call.network_bytes / machine.rate(call, mesh)
    return seconds
