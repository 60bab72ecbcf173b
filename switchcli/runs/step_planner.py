"""The plan of a recipe's training step on any number of devices."""

from collections.abc import Iterator
from math import ceil

from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.planner.plan import Fit, Machine, Plan, meshes, model_axes, plan, try_mesh
from switchcli.planner.step import FLOAT, Mesh, RankWeights, Step, rank_weights
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.runs.transformers_checkpoint import meta_model


class StepPlanner:
    """Plans the training step of a recipe. The weights are built once, on the meta device."""

    def __init__(self, recipe: TrainingRecipe, fused: bool) -> None:
        """Build the weights and the optimizer state. `fused` assumes the fused kernels of a GPU."""
        train = recipe.train
        self._recipe = recipe
        self._step = Step(
            recipe.rows_per_step,
            recipe.inputs_length,
            recipe.targets_length,
            product_bytes=4 if train.precision == "float32" else 2,
            router_bytes=train.router_dtype.itemsize,
            fused=fused,
            comm_bytes=4 if recipe.parallel.comm_dtype == "float32" else None,
            recomputed=train.activation_checkpointing == "blocks",
            ordered=recipe.parallel.reduction == "ordered",
        )
        self._microbatch = train.microbatch_tokens and train.microbatch_tokens // recipe.inputs_length
        self._weights = dict(meta_model(recipe.model).named_parameters())
        self._state = recipe.optimizer.build(self._weights).state()
        self._rank_weights: dict[int, RankWeights] = {}

    def plan(self, machine: Machine) -> Plan:
        """Return the plan on all meshes of the machine's devices that the recipe allows."""
        own = self._weights_by_model(machine.devices)
        every = plan(self._recipe.model, self._step, machine, self._microbatch, own)
        return Plan(
            tuple(fit for fit in every.fits if self._allows(fit.mesh)),
            tuple(rejection for rejection in every.rejected if self._allows(rejection.mesh)),
        )

    def fewest_devices(self, machine: Machine) -> int | None:
        """Return the smallest power of two of such devices that a mesh fits on; None if no number of them suffices."""
        # At best, all devices divide the weights and their gradients among them. Fewer devices need not be tried.
        num_bytes = 2 * FLOAT * sum(weight.numel() for weight in self._weights.values())
        devices = 1 << (ceil(num_bytes / machine.usable_bytes) - 1).bit_length()
        # Each row of the batch on a rank of its own, and each head.
        max_devices = self._recipe.rows_per_step * self._recipe.model.num_heads
        while devices <= max_devices:
            if any(self._fits(machine._replace(devices=devices))):
                return devices
            devices *= 2
        return None

    def _fits(self, machine: Machine) -> Iterator[bool]:
        """Yield whether the step fits, for each mesh that the recipe allows."""
        own = self._weights_by_model(machine.devices)
        for mesh in filter(self._allows, meshes(self._recipe.model, machine.devices)):
            tried = try_mesh(self._recipe.model, self._step, machine, mesh, self._microbatch, own)
            yield isinstance(tried, Fit)

    def _allows(self, mesh: Mesh) -> bool:
        """Return whether the mesh is as the recipe says: any, if it says nothing."""
        parallel: ParallelSpec = self._recipe.parallel
        if parallel.is_unset:
            return True
        shard = parallel.shard if mesh.data > 1 else "none"  # sharding matters only with several data-parallel ranks
        if parallel.data not in (None, mesh.data):
            return False
        return (mesh.expert, mesh.model, mesh.shard) == (parallel.expert, parallel.model, shard)

    def _weights_by_model(self, devices: int) -> dict[int, RankWeights]:
        """Return the weights of a rank by the size of the model axis, for each size that the model allows."""
        for model in model_axes(self._recipe.model, devices):
            if model not in self._rank_weights:
                self._rank_weights[model] = rank_weights(self._weights, self._state, model)
        return self._rank_weights
