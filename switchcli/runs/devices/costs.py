"""What a recipe's training costs: the size of its model and run, and the planner of its step."""

import math
from typing import Any

from switchcli.planner.meshes import Parameters, Planner
from switchcli.planner.step import Step, Tensors
from switchcli.recipe.training_recipe import TrainingRecipe

_MUON_SHARE = 0.5
"""FLOPs of Muon for an expert, over those of its training, above which a warning is given."""


def describe(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the parameters, FLOPs and tokens of a run. No model is allocated and no text is read.

    FLOPs are those of the forward pass, by the formula of the paper's section 5.6.
    """
    cost = planner_of(recipe).counts
    input_tokens = recipe.train.steps * recipe.train.batch_tokens
    return {
        "parameters": cost.parameters,
        "dense_parameters": cost.dense,
        "expert_parameters": cost.expert,
        "active_parameters": cost.active,
        "flops_per_sequence": cost.flops,
        "router_flops_per_sequence": cost.router_flops,
        "inputs_length": recipe.inputs_length,
        "targets_length": recipe.targets_length,
        "sequences_per_step": recipe.rows_per_step,
        "steps": recipe.train.steps,
        "input_tokens": input_tokens,
        # A batch holds whole sequences, so the division is exact.
        "target_tokens": input_tokens // recipe.inputs_length * recipe.targets_length,
    }


def planner_of(recipe: TrainingRecipe, fused: bool = True) -> Planner:
    """Return the planner of a recipe's step, on the meshes that it allows. `fused` assumes the kernels of a GPU."""
    train = recipe.train
    step = Step(
        recipe.rows_per_step,
        recipe.inputs_length,
        recipe.targets_length,
        product_bytes=4 if train.precision == "float32" else 2,
        router_bytes=train.router_dtype.itemsize,
        fused=fused,
        recomputed=train.activation_checkpointing == "blocks",
    )
    microbatch = train.microbatch_tokens and train.microbatch_tokens // recipe.inputs_length

    def optimizer_state(weights: Parameters) -> Tensors:
        return recipe.optimizer.build(weights).state()

    return Planner(recipe.model, step, optimizer_state, microbatch, recipe.parallel)


def muon_warning(recipe: TrainingRecipe) -> str | None:
    """Return why Muon is too expensive for the batch, with the fix; None if it is not, and for other optimizers."""
    if recipe.optimizer.kind != "muon" or (share := planner_of(recipe).orthogonal_share) <= _MUON_SHARE:
        return None
    batch = recipe.train.batch_tokens
    return (
        f"Muon takes {share:.3g} times the FLOPs of an expert's training, as its own do not depend on the batch: raise "
        f"train.batch_tokens ({batch:,}) to {math.ceil(batch * share / _MUON_SHARE):,} for {_MUON_SHARE:g}, or take "
        "optimizer.kind=adamw"
    )
