"""The plan of a training step: which meshes fit on some devices, and the bytes that each device needs.

A mesh is rejected by a rule (sizes that do not divide, a batch that cannot be shared), or by the memory of a device.
The others are in the order of `Fit.divisions`: those that divide least come first.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from math import ceil
from typing import Literal, NamedTuple, Self

import torch

from switchcli.distributed.parallel_spec import ParallelSpec, Shard, batch_problem, mesh_problems
from switchcli.model.config import ModelSpec
from switchcli.model.flops import FORWARD_AND_BACKWARD, ModelCounts, count
from switchcli.model.transformer import SwitchTransformer
from switchcli.planner import devices
from switchcli.planner.memory_use import DeviceBytes, device_bytes
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Step, Tensors, rank_weights

GIB = 2**30
Parameters = Mapping[str, torch.nn.Parameter]
SHARDS: tuple[Shard, ...] = ("none", "zero2", "zero3")


class Machine(NamedTuple):
    """The devices that a step runs on."""

    devices: int
    memory_bytes: int
    """Memory of one device, of which a plan fills `usable_bytes`."""
    gpu: str | None = None
    """The name in planner/devices.py; None for devices whose rates are not known."""

    @classmethod
    def of_gpu(cls, number: int, name: str) -> Self:
        """Return devices of planner/devices.py, by their name. Raises RecipeError for an unknown one."""
        return cls(number, devices.find(name).memory_bytes, name.lower())

    @property
    def usable_bytes(self) -> int:
        """Bytes of one device that a mesh may fill."""
        return int((1 - devices.RESERVED_FRACTION) * self.memory_bytes)

    def flops_per_second(self, product_bytes: int) -> float | None:
        """Return the FLOP/s that one device is assumed to reach in products of so many bytes an element, if known."""
        if self.gpu is None:
            return None
        gpu = devices.GPUS[self.gpu]
        return devices.UTILIZATION * (gpu.float32_flops if product_bytes == FLOAT else gpu.flops)


class Fit(NamedTuple):
    """A mesh that the step fits on, with its memory."""

    mesh: Mesh
    microbatch: int
    """Sequences of a microbatch: as the recipe says, else the most that fit."""
    bytes: DeviceBytes

    @property
    def divisions(self) -> tuple[int, ...]:
        """How much the mesh divides: meshes with less are planned first.

        The model axis counts most, then zero3, zero2 and the expert axis; then the larger microbatch goes first.
        """
        mesh = self.mesh
        return (mesh.model, SHARDS.index(mesh.shard), mesh.expert > 1, -self.microbatch, mesh.expert)


class Rejection(NamedTuple):
    """A mesh that the step does not fit on, and the reason with its numbers."""

    mesh: Mesh
    kind: Literal["rule", "batch", "memory"]
    reason: str
    bytes_needed: int = 0
    """Memory that a device would need; 0 unless memory is the reason."""


class Plan(NamedTuple):
    """The meshes of a number of devices, divided into those that fit and those that do not."""

    fits: tuple[Fit, ...]
    """In the order of `Fit.divisions`."""
    rejected: tuple[Rejection, ...]

    @property
    def best(self) -> Fit | None:
        """The mesh that divides least; None if the step does not fit on the devices."""
        return self.fits[0] if self.fits else None

    def reasons(self) -> list[tuple[str, int]]:
        """Return each reason for rejecting meshes, and the number of these meshes.

        Rules and batches come first, then memory, the smallest need first. The ways to shard one mesh that does not fit
        into memory are one entry, with the reason of the one that needs least.
        """
        entries: dict[object, tuple[str, int]] = {}
        for rejection in sorted(self.rejected, key=lambda one: (one.kind == "memory", one.bytes_needed)):
            key: object = rejection.reason
            text = rejection.reason
            if rejection.kind == "memory":
                key = rejection.mesh._replace(shard="none")
                text = f"{rejection.mesh}: {rejection.reason}"
            first_text, num_meshes = entries.get(key, (text, 0))
            entries[key] = (first_text, num_meshes + 1)
        return list(entries.values())


class Planner:
    """A training step of a model: its parameters and FLOPs, and on any devices the meshes and the bytes.

    Weights and optimizer state are made on the meta device, when the first mesh is planned.
    """

    def __init__(
        self,
        spec: ModelSpec,
        step: Step,
        optimizer_state: Callable[[Parameters], Tensors],
        microbatch: int | None = None,
        parallel: ParallelSpec | None = None,
    ) -> None:
        """Plan for these sizes.

        Args:
            spec: the model.
            step: the batch and its precision.
            optimizer_state: the optimizer state of parameters, by `<parameter>/<slot>`.
            microbatch: sequences of a microbatch; None for the most that fit.
            parallel: the mesh to plan, as far as it is set; None for every mesh.
        """
        self.spec, self.step = spec, step
        self._optimizer_state = optimizer_state
        self._microbatch = microbatch
        self._parallel = parallel or ParallelSpec()
        self._rank_weights: dict[int, RankWeights] = {}

    @property
    def counts(self) -> ModelCounts:
        """Parameters, and FLOPs of a sequence forward, by the formula of the paper's section 5.6."""
        return count(self.spec, self.step.source, self.step.target)

    @property
    def flops_per_step(self) -> int:
        """The model's FLOPs, forward and backward, without what activation checkpointing computes again."""
        return FORWARD_AND_BACKWARD * self.step.sequences * self.counts.flops

    @property
    def optimizer_flops_per_step(self) -> int:
        """The FLOPs of Muon's Newton-Schulz iterations, each matrix once; 0 for other optimizers, without products."""
        own = self.weights_of_rank(1)
        return own.dense_orthogonal_flops + own.expert_orthogonal_flops

    @property
    def orthogonal_share(self) -> float:
        """The FLOPs of Muon for an expert over those of its training, forward and backward; 0 with other optimizers.

        The expert is one of the stack with more tokens, the encoder if it has some, at equal loads. Muon's FLOPs do not
        depend on the batch: a decoder of shorter sequences has a larger share.
        """
        spec, own = self.spec, self.weights_of_rank(1)
        if not own.expert_orthogonal_flops:
            return 0.0
        rows = max(
            self.step.sequences * self.step.length(stack) * spec.router_of(stack).experts_per_token
            for stack in spec.sparse_stacks
        )
        # Two FLOPs for each row and parameter, of rows / E rows each.
        return own.expert_orthogonal_flops / (FORWARD_AND_BACKWARD * 2 * own.expert * rows / spec.num_experts)

    def seconds(self, machine: Machine) -> float | None:
        """Return the seconds of a step: its FLOPs over those that all devices are assumed to reach, if known.

        Nothing else counts, and it was never compared with a measurement.
        """
        rate = machine.flops_per_second(self.step.product_bytes)
        return None if rate is None else self.flops_per_step / (machine.devices * rate)

    @cached_property
    def _weights(self) -> Parameters:
        with torch.device("meta"):
            return dict(SwitchTransformer(self.spec).named_parameters())

    @cached_property
    def _state(self) -> Tensors:
        return self._optimizer_state(self._weights)

    def plan(self, machine: Machine) -> Plan:
        """Return which meshes of the machine's devices the step fits on."""
        outcomes = [self._try_mesh(mesh, machine) for mesh in self._meshes(machine.devices)]
        fits = [outcome for outcome in outcomes if isinstance(outcome, Fit)]
        fits.sort(key=lambda fit: fit.divisions)
        return Plan(tuple(fits), tuple(outcome for outcome in outcomes if isinstance(outcome, Rejection)))

    def fewest_devices(self, machine: Machine) -> int | None:
        """Return the smallest power of two of such devices that a mesh fits on; None if no number of them suffices."""
        # At best, all devices divide the weights and their gradients among them. Fewer devices need not be tried.
        num_bytes = 2 * FLOAT * sum(weight.numel() for weight in self._weights.values())
        number = 1 << (ceil(num_bytes / machine.usable_bytes) - 1).bit_length()
        # Each row of the batch on a rank of its own, and each head.
        max_number = self.step.sequences * self.spec.num_heads
        while number <= max_number:
            more = machine._replace(devices=number)
            if any(isinstance(self._try_mesh(mesh, more), Fit) for mesh in self._meshes(number)):
                return number
            number *= 2
        return None

    def _meshes(self, number: int) -> Iterator[Mesh]:
        """Yield every mesh of so many devices that `parallel` allows."""
        return filter(self._allows, meshes(self.spec, number))

    def _allows(self, mesh: Mesh) -> bool:
        """Return whether the mesh is as `parallel` says: any, if it says nothing."""
        parallel = self._parallel
        if parallel.is_unset:
            return True
        shard = parallel.shard if mesh.data > 1 else "none"  # sharding matters only with several data-parallel ranks
        if parallel.data not in (None, mesh.data):
            return False
        return (mesh.expert, mesh.model, mesh.shard) == (parallel.expert, parallel.model, shard)

    def _try_mesh(self, mesh: Mesh, machine: Machine) -> Fit | Rejection:
        """Return how the step fits on a mesh of the machine's devices, or why it does not."""
        spec, step = self.spec, self.step
        if reason := next(mesh_problems(spec, mesh.model, mesh.expert), None):
            return Rejection(mesh, "rule", reason)
        if reason := batch_problem(step.sequences, mesh.data, self._microbatch, spec.group_sequences, step.source):
            return Rejection(mesh, "batch", reason)
        weights = self.weights_of_rank(mesh.model)
        if self._microbatch:
            sizes = [self._microbatch]
        else:
            sizes = microbatch_sizes(step.sequences // mesh.data, spec.group_sequences)
        for size in sizes:
            needed = device_bytes(spec, step, mesh, weights, size)
            if needed.total <= machine.usable_bytes:
                return Fit(mesh, size, needed)
        parts = ", ".join(f"{name} {num_bytes / GIB:.3g}" for name, num_bytes in needed._asdict().items() if num_bytes)
        available = f"{machine.usable_bytes / GIB:.3g} GiB of its {machine.memory_bytes / GIB:.3g} GiB"
        reason = (
            f"needs {needed.total / GIB:.3g} GiB a device, which has {available}, with microbatches of {size} "
            f"sequences: {parts}"
        )
        return Rejection(mesh, "memory", reason, needed.total)

    def weights_of_rank(self, model: int) -> RankWeights:
        """Return the weights of a rank on a model axis of this size."""
        if model not in self._rank_weights:
            self._rank_weights[model] = rank_weights(self._weights, self._state, model)
        return self._rank_weights[model]


def meshes(spec: ModelSpec, devices: int) -> Iterator[Mesh]:
    """Yield every mesh of `devices` devices, also those that the sizes of the model do not allow."""
    for model in divisors(devices):
        data = devices // model
        for expert in divisors(data) if spec.num_experts > 1 else [1]:
            for shard in SHARDS if data > 1 else SHARDS[:1]:
                yield Mesh(data, expert, model, shard)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def microbatch_sizes(rank_sequences: int, group_sequences: int) -> list[int]:
    """Return the possible sizes of a microbatch in sequences, descending.

    They divide the `rank_sequences` of a rank into equal microbatches of whole routing groups.
    """
    return [num_groups * group_sequences for num_groups in reversed(divisors(rank_sequences // group_sequences))]
