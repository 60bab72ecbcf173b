"""Take experts out of a trained model: those that its own held-out text asks for least."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.distributed.context import DistributedContext
from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import Policy
from switchcli.model.surgery import prune as pruning
from switchcli.model.surgery.prune import By, Gate
from switchcli.recipe.schema import EvalRecipe
from switchcli.report.console import Console
from switchcli.runs.accelerate_settings import warn_about_settings
from switchcli.runs.eval_job import resolve_job
from switchcli.runs.evaluator import Evaluator
from switchcli.runs.loading import empty_model, load_model
from switchcli.runs.new_folder import (
    check_checkpoint_destination,
    continuation_recipe,
    data_document,
    next_command,
    publish_checkpoint,
)
from switchcli.runs.upcycling import with_experts
from switchcli.train import memory
from switchcli.train.checkpointer import logical_tensors


def prune(
    checkpoint: Path,
    destination: Path,
    name: str | None,
    overrides: Sequence[str],
    console: Console,
    *,
    experts: int,
    by: By,
    gate: Gate,
    sequences: int | None,
) -> dict[str, Any]:
    """Write the model with so many `experts` a layer at `destination`; return what it measures before and after.

    Both are measured on the same batches, by the recipe `name` with `overrides`: on `sequences` rows of text and as
    many examples of each task, or on as many as the recipe says.

    Raises:
        CheckpointError: there is no sparse model at `checkpoint`, or the disk refuses.
        RecipeError: as `resolve_job`; or so many experts cannot be kept.
        DataError: of what it is measured on.
        OutOfMemory: the device has no room.
    """
    recipe, opened = resolve_job(checkpoint, name, overrides, console)
    _check(opened.recipe.model, opened.path, experts, console)
    policy, recipe = _measured_by(recipe, sequences)
    smaller = with_experts(opened, experts)
    destination = check_checkpoint_destination(checkpoint, destination)
    context = DistributedContext(recipe.device, recipe.precision)
    warn_about_settings(recipe, context)
    if context.world > 1:
        raise RecipeError(f"prune works in one process, and there are {context.world} ranks: start it by itself")
    console.message(f"measuring {opened.path}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        loaded = load_model(opened, context.device)
        evaluator = Evaluator(loaded, recipe, context, console)
        with pruning.probability_mass(loaded.model) as mass:
            before = evaluator.held_out(loaded.model, policy).named()
        if not before:
            raise DataError(f"{opened.path}: no labelled example in what it is measured on: name text or other tasks")
        cuts = pruning.plan_pruning(loaded.model, _loads(before), mass, experts, gate)
        pruned = empty_model(smaller, context.device)
        pruning.prune(loaded.model, cuts, pruned, by)
        after = evaluator.held_out(pruned, policy).named()
    recipe_of_it = continuation_recipe(smaller, destination)
    publish_checkpoint(destination, recipe_of_it, opened.tokenizer, logical_tensors(pruned), data_document(opened))
    context.close()
    figure = NEG_LOG_PERPLEXITY
    return {
        "source": str(opened.path),
        "destination": str(destination),
        "by": by,
        "gate": gate,
        "capacity": policy,
        "experts": {"before": opened.recipe.model.num_experts, "after": experts},
        "parameters": {"before": count(opened.recipe.model).parameters, "after": count(smaller.model).parameters},
        "held_out": {
            name: {"sequences": one["sequences"], "before": one[figure], "after": after[name][figure]}
            for name, one in before.items()
        },
        "next": next_command(smaller, destination),
        "layers": {layer: {**one._asdict(), "wo": float(one.wo)} for layer, one in cuts.items()},
    }


def _check(spec: ModelSpec, path: Path, experts: int, console: Console) -> None:
    """Raise unless so many experts can be kept of the model at `path`."""
    there = spec.num_experts
    if there == 1:
        raise CheckpointError(f"{path}: a dense model has no experts to take out: name a sparse one")
    if experts < 2:
        raise RecipeError(
            f"--experts ({experts}) must be at least 2: a single expert has no router, and is a dense model: "
            "`switchcli distill` makes one"
        )
    if experts >= there:
        raise RecipeError(
            f"--experts ({experts}) must be less than the {there} of {path}, or none is taken out: try {there // 2}"
        )
    if any(spec.sparse_layers(stack) and spec.router_of(stack).experts_choose for stack in STACKS):
        console.warning("expert_choice gives all experts of a layer the same load: the first ones are kept")


def _measured_by(recipe: EvalRecipe, sequences: int | None) -> tuple[Policy, EvalRecipe]:
    """How capacity is counted, dropless unless said, as the model is to be served; and the recipe for so many rows."""
    if recipe.capacities is not None and len(recipe.capacities) > 1:
        raise RecipeError(f"capacities ({len(recipe.capacities)}): one alone decides which experts stay")
    policy: Policy = "dropless" if recipe.capacities is None else recipe.capacities[0]
    if sequences is None:
        return policy, recipe
    scoring = recipe.scoring.model_copy(update={"examples": sequences})
    text = recipe.text and recipe.text.model_copy(update={"sequences": sequences})
    return policy, recipe.model_copy(update={"scoring": scoring, "text": text})


def _loads(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """How many tokens asked for each expert of each layer, on all that was measured."""
    each = [one["layers"] for one in figures.values()]
    return {
        layer: [sum(load) for load in zip(*(layers[layer]["load"] for layers in each), strict=True)]
        for layer in each[0]
    }
