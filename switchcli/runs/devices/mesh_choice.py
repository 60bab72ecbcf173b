"""Build the ranks of a run as the mesh of its recipe, or with `parallel: auto` as the first mesh of the plan.

An evaluation has no mesh: each rank holds the model.

`accelerate launch` passes its options, and those of its configuration file, to the processes that it starts as
environment variables (accelerate 1.15, utils/launch.py). switchcli takes the ranks and the device from accelerate;
everything else is a key of the recipe.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from switchcli.distributed.context import RECIPE_DECIDES, DistributedContext, uses_cuda
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.errors import RecipeError, machine_bytes
from switchcli.model.config import Precision
from switchcli.planner.meshes import Machine
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.devices.costs import planner_of
from switchcli.terminal.console import Console

EVAL_KEYS: Final[Mapping[str, str]] = MappingProxyType({"ACCELERATE_MIXED_PRECISION": "precision"})
"""The variables that an evaluation does not take over, and its keys that decide instead."""
OFF: Final = ("", "no", "false", "0")
"""Values that ask for nothing."""
PRECISIONS: Final = {"bf16": ("bfloat16", "selective")}
"""The recipe's precisions that agree with one of accelerate's."""


def build_context(recipe: TrainingRecipe) -> DistributedContext:
    """Return the distributed context of a run. Warn about settings of accelerate that are ignored.

    Raises:
        RecipeError: no mesh fits with `parallel: auto`.
        SwitchError: as `DistributedContext` says.
    """
    choose = (lambda: least_divided_mesh(recipe)) if recipe.parallel.auto else None
    context = DistributedContext(recipe.device, recipe.precision, recipe.parallel, choose)
    _warn_about_settings(recipe.precision, context)
    return context


def build_eval_context(recipe: EvalRecipe) -> DistributedContext:
    """Return the distributed context of an evaluation: every rank holds the model. Warn like `build_context`.

    Raises:
        SwitchError: as `DistributedContext` says.
    """
    context = DistributedContext(recipe.device, recipe.precision)
    _warn_about_settings(recipe.precision, context, EVAL_KEYS)
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


def _warn_about_settings(
    precision: Precision, context: DistributedContext, keys: Mapping[str, str] = RECIPE_DECIDES
) -> None:
    """Print one line on the main rank that names the settings of accelerate that the recipe's `keys` override.

    Another line says that accelerate was asked for several processes and started only this one: for several it sets
    MASTER_PORT, but WORLD_SIZE only if it uses torchrun (`--multi_gpu`).
    """
    environment, console = os.environ, Console()
    if not context.is_main:
        return
    ignored = {name: key for name, key in keys.items() if environment.get(name, "").lower() not in OFF}
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == "1":
        ignored.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    if precision in PRECISIONS.get(environment.get("ACCELERATE_MIXED_PRECISION", "").lower(), ()):
        ignored.pop("ACCELERATE_MIXED_PRECISION", None)
    if context.parallel.shard != "none":
        ignored.pop("ACCELERATE_USE_FSDP", None)
    if ignored:
        asked = ", ".join(f"{name}={environment[name]} ({key})" for name, key in ignored.items())
        console.warning(f"accelerate asks for what the recipe decides, so it is ignored: {asked}")
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment and "WORLD_SIZE" not in environment:
        console.warning(
            "accelerate was asked for several processes and started one: add `--processes N` at the end of the "
            "command, or start N by `accelerate launch --multi_gpu --num_processes N`, which works without GPUs too"
        )
