"""Build the ranks of a run as the mesh of its recipe, or with `parallel: auto` as the first mesh of the plan.

An evaluation has no mesh: each rank holds the model.
"""

import os

import torch

from switchcli.distributed.context import DistributedContext, uses_cuda
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.errors import RecipeError, machine_bytes
from switchcli.planner.plan import Machine
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.devices import accelerate_settings
from switchcli.runs.devices.planning import planner_of


def build_context(recipe: TrainingRecipe) -> DistributedContext:
    """Return the distributed context of a run. Warn about settings of accelerate that are ignored.

    Raises:
        RecipeError: no mesh fits with `parallel: auto`.
        SwitchError: as `DistributedContext` says.
    """
    choose = (lambda: least_divided_mesh(recipe)) if recipe.parallel.auto else None
    context = DistributedContext(recipe.device, recipe.precision, recipe.parallel, choose)
    accelerate_settings.warn_about_settings(recipe.precision, context)
    return context


def build_eval_context(recipe: EvalRecipe) -> DistributedContext:
    """Return the distributed context of an evaluation: every rank holds the model. Warn like `build_context`.

    Raises:
        SwitchError: as `DistributedContext` says.
    """
    context = DistributedContext(recipe.device, recipe.precision)
    accelerate_settings.warn_about_settings(recipe.precision, context, accelerate_settings.EVAL_KEYS)
    return context


def least_divided_mesh(recipe: TrainingRecipe) -> ParallelSpec:
    """Return the mesh that divides least, for the ranks that a launcher started, by the memory of this rank's device.

    Raises:
        RecipeError: no mesh with this number of ranks fits.
    """
    ranks, local_ranks = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    cuda = uses_cuda(recipe.train.device)
    # On a CPU, the ranks of a machine share its memory.
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else machine_bytes() // local_ranks
    candidates = planner_of(recipe, fused=cuda).plan(Machine(ranks, memory))
    # Without train.microbatch_tokens a rank takes its share of a batch at once. A plan may divide it into microbatches.
    at_once = not recipe.train.microbatch_tokens
    for fit in candidates.fits:
        if not at_once or fit.microbatch * fit.mesh.data == recipe.rows_per_step:
            data, expert, model, shard = fit.mesh
            return ParallelSpec(data=data, model=model, expert=expert, shard=shard)
    reason = ""
    if not candidates.fits:
        # Meshes that lack memory come first, and of these the one that needs the least.
        closest = min(candidates.rejected, key=lambda rejection: (rejection.kind != "memory", rejection.bytes_needed))
        reason = f": {closest.reason}"
    fix = "set train.microbatch_tokens" if at_once else "set a smaller train.microbatch_tokens"
    raise RecipeError(
        f"parallel.auto: no mesh of {ranks} ranks fits with {'the whole share' if at_once else 'microbatches'} of a "
        f"batch{reason}: {fix}, or start more ranks (`switchcli plan` shows all meshes)"
    )
