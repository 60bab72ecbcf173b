"""What each expert of a checkpoint takes, and how far two checkpoints differ in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.distributed.context import DistributedContext
from switchcli.errors import CheckpointError, RecipeError
from switchcli.report.console import Console
from switchcli.runs.accelerate_settings import warn_about_settings
from switchcli.runs.eval_job import resolve_job
from switchcli.runs.evaluator import ROWS_EACH, Evaluator
from switchcli.runs.loading import CheckpointHandle, load_model, open_model
from switchcli.runs.run_dir import machine_info
from switchcli.train import memory
from switchcli.train.routing_report import routing_report


def survey_checkpoints(paths: Sequence[Path], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Return the routing of one or two checkpoints, on the first one's text, as a JSON object.

    Raises:
        CheckpointError: there is none, it is dense, or the two cannot be compared.
        RecipeError: of the keys, which are those of `switchcli eval`; or not one checkpoint, nor two.
        DataError: of the text.
        OutOfMemory: the device has no room.
    """
    if not 1 <= len(paths) <= 2:
        raise RecipeError(f"--routing takes a checkpoint, or two to compare, and {len(paths)} are named")
    opened = [open_model(path, console) for path in paths]
    for one in opened:
        if one.recipe.model.num_experts == 1:
            raise CheckpointError(f"{one.path}: a dense model has no routing: name one with experts")
    if len(opened) > 1:
        _check_comparable(*opened)
    recipe, _ = resolve_job(paths[0], None, overrides, console)
    if recipe.capacities is not None and len(recipe.capacities) > 1:
        raise RecipeError(f"capacities ({list(recipe.capacities)}): an atlas is of one: name one alone")
    context = DistributedContext(recipe.device, recipe.precision)
    warn_about_settings(recipe, context)
    console.message(f"measuring {' and '.join(str(one.path) for one in opened)}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        loaded = [load_model(one, context.device) for one in opened]
        evaluator = Evaluator(loaded[0], recipe, context, console)
        policies = [recipe.capacities[0] if recipe.capacities else one.recipe.eval.capacity for one in loaded]
        models = [one.model for one in loaded]
        texts, tokenizer = evaluator.rows(), loaded[0].tokenizer
        found = routing_report(models, texts, ROWS_EACH, policies, context, tokenizer, console)
        context.close()
        return {
            "recipe": recipe.model_dump(mode="json"),
            "sequences": found["sequences"],
            "rare": found["rare"],
            "atlases": [
                {
                    "checkpoint": str(one.path),
                    "step": one.step,
                    "capacity": policy,
                    "num_experts": one.recipe.model.num_experts,
                    "layers": layers,
                }
                for one, policy, layers in zip(loaded, policies, found["layers"], strict=True)
            ],
            "drift": found["drift"],
            **machine_info(context),
        }


def _check_comparable(one: CheckpointHandle, other: CheckpointHandle) -> None:
    """Raise a CheckpointError where tokens or experts of one are not those of the other."""
    ours, theirs = one.recipe.model, other.recipe.model
    pieces, others = (each.tokenizer.pieces(range(each.tokenizer.vocab_size)) for each in (one, other))
    if pieces != others:
        why = "their vocabularies differ, and a token of the one is none of the other"
    elif ours.num_experts != theirs.num_experts:
        why = f"{ours.num_experts} experts and {theirs.num_experts} cannot be matched"
    elif ours.sparse_layer_names() != theirs.sparse_layer_names():
        names = "; ".join(", ".join(spec.sparse_layer_names()) for spec in (ours, theirs))
        why = f"their sparse layers differ ({names})"
    else:
        return
    raise CheckpointError(
        f"{one.path} and {other.path}: {why}: name two checkpoints of one run, or of runs of one shape and one "
        "vocabulary"
    )
