"""Remove the experts that held-out text uses least from a trained model, and measure the loss in quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import Policy
from switchcli.model.surgery import prune as pruning
from switchcli.model.surgery.prune import By, Gate
from switchcli.recipe.schema import EvalRecipe
from switchcli.report.console import Console
from switchcli.runs.devices.mesh_choice import build_eval_context
from switchcli.runs.evaluate.eval_data import build_eval_data
from switchcli.runs.evaluate.eval_job import resolve_job
from switchcli.runs.inputs.loading import empty_model, load_model, open_model
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    continuation_recipe,
    data_document,
    next_command,
    publish_checkpoint,
)
from switchcli.runs.models.upcycling import with_experts
from switchcli.training import memory
from switchcli.training.checkpointer import logical_tensors


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
) -> dict[str, Any]:
    """Write the model with `experts` experts per layer to `destination`. Return the JSON result.

    Both models are measured on the same batches, by the evaluation recipe `name` with `overrides`.

    Raises:
        CheckpointError: there is no sparse model at `checkpoint`, or the disk cannot be written.
        RecipeError: as `resolve_job` says, or the number of experts is not possible.
        DataError: the data to measure on cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    handle = open_model(checkpoint, console)
    recipe = resolve_job(handle, name, overrides).recipe
    spec = handle.recipe.model
    _check_experts(spec, handle.path, experts, console)
    policy = _capacity(recipe)
    pruned_recipe = with_experts(handle, experts)
    destination = check_checkpoint_destination(checkpoint, destination)
    context = build_eval_context(recipe)
    if context.world > 1:
        raise RecipeError(f"prune works in one process, and there are {context.world} ranks: start it by itself")
    console.message(f"measuring {handle.path}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        original = load_model(handle, context.device)
        (evaluator, *_), _ = build_eval_data(original, recipe, context, console)
        evaluator = evaluator._replace(tasks=(), capacity={"text": policy, "tasks": policy})
        with pruning.probability_mass(original.model) as mass:
            before = evaluator(original.model).parts()
        if not before:
            raise DataError(f"{handle.path}: no labeled example in what it is measured on: name text or other tasks")
        layer_plans = pruning.plan_pruning(original.model, _load_by_layer(before), mass, experts, gate)
        pruned = empty_model(pruned_recipe, context.device)
        pruning.prune(original.model, layer_plans, pruned, by)
        after = evaluator(pruned).parts()
    publish_checkpoint(
        destination,
        continuation_recipe(pruned_recipe, destination),
        handle.tokenizer,
        logical_tensors(pruned),
        data_document(handle),
    )
    context.close()
    return {
        "source": str(handle.path),
        "destination": str(destination),
        "by": by,
        "gate": gate,
        "capacity": policy,
        "experts": {"before": spec.num_experts, "after": experts},
        "parameters": {"before": count(spec).parameters, "after": count(pruned_recipe.model).parameters},
        "held_out": {
            name: {
                "sequences": metrics["sequences"],
                "before": metrics[NEG_LOG_PERPLEXITY],
                "after": after[name][NEG_LOG_PERPLEXITY],
            }
            for name, metrics in before.items()
        },
        "next": next_command(pruned_recipe, destination),
        "layers": {name: {**plan._asdict(), "wo": float(plan.wo)} for name, plan in layer_plans.items()},
    }


def _check_experts(spec: ModelSpec, path: Path, experts: int, console: Console) -> None:
    """Raise an error unless the model at `path` can be pruned to `experts` experts.

    Raises:
        CheckpointError: the model is dense.
        RecipeError: the number is below 2, or not below that of the model.
    """
    num_experts = spec.num_experts
    if num_experts == 1:
        raise CheckpointError(f"{path}: a dense model has no experts to take out: name a sparse one")
    if experts < 2:
        raise RecipeError(
            f"--experts ({experts}) must be at least 2: a single expert has no router, and is a dense model: "
            "`switchcli distill` makes one"
        )
    if experts >= num_experts:
        raise RecipeError(
            f"--experts ({experts}) must be less than the {num_experts} of {path}, or none is taken out: try "
            f"{num_experts // 2}"
        )
    if any(spec.sparse_layers(stack) and spec.router_of(stack).experts_choose for stack in STACKS):
        console.warning("expert_choice gives all experts of a layer the same load: the first ones are kept")


def _capacity(recipe: EvalRecipe) -> Policy:
    """Return the capacity to measure with. The default is dropless, as a pruned model is served.

    Raises:
        RecipeError: the recipe has several capacities.
    """
    if recipe.capacities is None:
        return "dropless"
    if len(recipe.capacities) > 1:
        raise RecipeError(f"capacities ({len(recipe.capacities)}): only one can decide which experts stay: name one")
    return recipe.capacities[0]


def _load_by_layer(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the number of tokens that chose each expert of each layer, summed over all texts and tasks."""
    sums: dict[str, list[int]] = {}
    for metrics in measured.values():
        for layer, layer_metrics in metrics["layers"].items():
            load = layer_metrics["load"]
            before = sums.get(layer, [0] * len(load))
            sums[layer] = [total + tokens for total, tokens in zip(before, load, strict=True)]
    return sums
