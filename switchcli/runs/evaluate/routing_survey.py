"""Measure which tokens each expert of a checkpoint gets, and how far the routing of two checkpoints differs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.analysis.routing_report import routing_report
from switchcli.errors import CheckpointError, RecipeError
from switchcli.report.console import Console
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.devices.mesh_choice import build_eval_context
from switchcli.runs.evaluate.eval_data import BATCH_ROWS, build_eval_data
from switchcli.runs.evaluate.eval_job import resolve_recipe
from switchcli.runs.inputs.loading import CheckpointHandle, load_model, open_model
from switchcli.training import memory
from switchcli.training.measure import named_texts


def survey_checkpoints(paths: Sequence[Path], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Return the routing of one or two checkpoints, measured on the text of the first, as a JSON object.

    Dense ones among `paths` are left out.

    `overrides` are KEY=VALUE for a recipe of `switchcli eval`.

    Raises:
        CheckpointError: there is no checkpoint, all are dense, or the two cannot be compared.
        RecipeError: a key breaks a rule, or the number of checkpoints with experts is not 1 or 2.
        DataError: the text cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    named = [open_model(path, console) for path in paths]
    handles = [handle for handle in named if handle.recipe.model.num_experts > 1]
    if named and not handles:
        raise CheckpointError(f"{named[0].path}: a dense model has no routing: name one with experts")
    if not 1 <= len(handles) <= 2:
        raise RecipeError(f"--routing takes a checkpoint with experts, or two to compare, and {len(handles)} are named")
    if len(handles) > 1:
        _check_comparable(*handles)
    recipe = resolve_recipe(handles[0], None, overrides)
    if recipe.capacities is not None and len(recipe.capacities) > 1:
        raise RecipeError(f"capacities ({list(recipe.capacities)}): routing is measured by one: name only one")
    context = build_eval_context(recipe)
    console.message(f"measuring {' and '.join(str(handle.path) for handle in handles)}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        models = [load_model(handle, context.device) for handle in handles]
        evaluator = build_eval_data(handles[0], recipe, context, console).evaluators[0]
        texts = {**named_texts(evaluator.texts), **evaluator.targets}
        policies = [recipe.capacities[0] if recipe.capacities else handle.recipe.eval.capacity for handle in handles]
        tokenizer = handles[0].tokenizer
        report = routing_report(models, texts, BATCH_ROWS, policies, context, tokenizer, console)
        context.close()
        return {
            "recipe": recipe.model_dump(mode="json"),
            "sequences": report["sequences"],
            "rare": report["rare"],
            "models": [
                {
                    "checkpoint": str(handle.path),
                    "step": handle.step,
                    "capacity": policy,
                    "num_experts": handle.recipe.model.num_experts,
                    "layers": layers,
                }
                for handle, policy, layers in zip(handles, policies, report["layers"], strict=True)
            ],
            "drift": report["drift"],
            **machine_info(context),
        }


def _check_comparable(first: CheckpointHandle, second: CheckpointHandle) -> None:
    """Raise CheckpointError if the two checkpoints have different vocabularies, expert counts or sparse layers."""
    specs = (first.recipe.model, second.recipe.model)
    first_pieces, second_pieces = (
        handle.tokenizer.pieces(range(handle.tokenizer.vocab_size)) for handle in (first, second)
    )
    if first_pieces != second_pieces:
        reason = "their vocabularies differ, so their tokens cannot be matched"
    elif specs[0].num_experts != specs[1].num_experts:
        reason = f"{specs[0].num_experts} experts and {specs[1].num_experts} cannot be matched"
    elif specs[0].sparse_layer_names() != specs[1].sparse_layer_names():
        names = "; ".join(", ".join(spec.sparse_layer_names()) for spec in specs)
        reason = f"their sparse layers differ ({names})"
    else:
        return
    raise CheckpointError(
        f"{first.path} and {second.path}: {reason}: name two checkpoints of one run, or of runs of one shape and one "
        "vocabulary"
    )
