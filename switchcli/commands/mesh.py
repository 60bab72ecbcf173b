"""The mesh of a run: as its recipe says, or by `parallel: auto` the fastest that the plan finds for these ranks."""

import os

import torch

from switchcli.commands.plan import plan_of
from switchcli.errors import RecipeError, machine_bytes
from switchcli.parallel.mesh import ParallelSpec
from switchcli.parallel.plan import Machine
from switchcli.recipe.training import TrainingRecipe

USABLE = 0.9
"""Of a device's memory: the plan leaves out what kernels and fragments take."""


def mesh_of(recipe: TrainingRecipe) -> ParallelSpec:
    """The mesh of the ranks that a launcher started, this one among them.

    Raises:
        RecipeError: no mesh of so many devices fits.
    """
    if not recipe.parallel.auto:
        return recipe.parallel
    ranks, beside = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if recipe.train.device != "cpu" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = machine_bytes() // beside
    plan = plan_of(recipe, Machine(ranks, int(USABLE * memory), node_devices=beside))
    at_once = not recipe.train.microbatch_tokens  # a run then takes its share at once, where a plan would cut it
    for fit in plan.fits:
        if not at_once or fit.microbatch * fit.mesh.data == recipe.rows_per_step:
            data, expert, model, shard = fit.mesh
            return ParallelSpec(data=data, model=model, expert=expert, shard=shard, wire=recipe.parallel.wire)
    why = f": {plan.refused[0].reason}" if plan.refused and not plan.fits else ""
    raise RecipeError(
        f"parallel.auto: no mesh of {ranks} ranks fits with {'the whole share' if at_once else 'microbatches'} of a "
        f"batch{why}: set a smaller train.microbatch_tokens, or start more ranks (`switchcli plan` shows all meshes)"
    )
