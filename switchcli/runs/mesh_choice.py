"""The ranks of a run in the mesh that its recipe says, or by `parallel: auto` in the fastest that the plan finds."""

import os

import torch

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.mesh import ParallelSpec
from switchcli.errors import RecipeError, machine_bytes
from switchcli.planner.plan import Machine, Plan, model_axes, plan
from switchcli.planner.step import Step, rank_weights
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.runs import accelerate_settings
from switchcli.runs.transformers_checkpoint import meta_model

USABLE = 0.9
"""Of a device's memory: the plan leaves out what kernels and fragments take."""


def build_context(recipe: TrainingRecipe | EvalRecipe) -> DistributedContext:
    """Return this process among the ranks of a run or an evaluation, after warnings about accelerate's settings.

    Raises as `DistributedContext`, and RecipeError where no mesh fits.
    """
    if isinstance(recipe, EvalRecipe):
        context = DistributedContext(recipe.device, recipe.precision)
    else:
        choose = (lambda: fastest_mesh(recipe)) if recipe.parallel.auto else None
        context = DistributedContext(recipe.train.device, recipe.train.precision, recipe.parallel, choose)
    accelerate_settings.warn_about_settings(recipe, context)
    accelerate_settings.warn_about_ranks(context)
    return context


def fastest_mesh(recipe: TrainingRecipe) -> ParallelSpec:
    """The mesh that the plan finds fastest for the ranks that a launcher started, by the memory of this one's device.

    Raises:
        RecipeError: no mesh of so many devices fits.
    """
    ranks, beside = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    cuda = recipe.train.device != "cpu" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else machine_bytes() // beside
    found = plan_of(recipe, Machine(ranks, int(USABLE * memory), node_devices=beside), fused=cuda)
    at_once = not recipe.train.microbatch_tokens  # a run then takes its share at once, where a plan would cut it
    for fit in found.fits:
        if not at_once or fit.microbatch * fit.mesh.data == recipe.rows_per_step:
            data, expert, model, shard = fit.mesh
            return ParallelSpec(
                data=data, model=model, expert=expert, shard=shard, comm_dtype=recipe.parallel.comm_dtype
            )
    why = (
        ""
        if found.fits
        else f": {min(found.rejected, key=lambda one: (one.kind != 'memory', one.bytes_needed)).reason}"
    )
    way_out = "set train.microbatch_tokens" if at_once else "set a smaller train.microbatch_tokens"
    raise RecipeError(
        f"parallel.auto: no mesh of {ranks} ranks fits with {'the whole share' if at_once else 'microbatches'} of a "
        f"batch{why}: {way_out}, or start more ranks (`switchcli plan` shows all meshes)"
    )


def plan_of(recipe: TrainingRecipe, machine: Machine, fused: bool) -> Plan:
    """The plan of a recipe's step, whatever mesh it says; `fused`: by the kernels of a GPU."""
    spec, train = recipe.model, recipe.train
    step = Step(
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
    microbatch = train.microbatch_tokens and train.microbatch_tokens // recipe.inputs_length
    weights = dict(meta_model(spec).named_parameters())
    state = recipe.optimizer.build(weights).state()
    own = {model: rank_weights(weights, state, model) for model in model_axes(spec, machine.devices)}
    return plan(spec, step, machine, microbatch, own)
