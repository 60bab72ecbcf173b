"""Measure which tokens each expert of a checkpoint gets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.analysis.routing_counts import count_routing
from switchcli.analysis.specialization import MIN_COUNT, specialization_metrics
from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe import resolve
from switchcli.runs.devices.machine_info import machine_info
from switchcli.runs.devices.mesh_choice import build_eval_context
from switchcli.runs.evaluate.eval_data import BATCH_ROWS, build_eval_data
from switchcli.runs.evaluate.eval_job import only_capacity, resolve_recipe
from switchcli.runs.inputs.loading import load_model, open_model
from switchcli.terminal.console import Console
from switchcli.training import memory
from switchcli.training.measure import named_texts
from switchcli.training.validation import rank_batches


def survey_routing(paths: Sequence[Path], overrides: Sequence[str], console: Console) -> dict[str, Any]:
    """Return the routing of the checkpoint with experts among `paths` as a JSON object.

    `overrides` are KEY=VALUE for a recipe of `switchcli eval`.

    Raises:
        CheckpointError: there is no checkpoint, or all are dense.
        RecipeError: a key breaks a rule, or not exactly one checkpoint has experts.
        DataError: the text cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    named = [open_model(path, console) for path in paths]
    handles = [handle for handle in named if handle.spec.num_experts > 1]
    if named and not handles:
        raise CheckpointError(f"{named[0].path}: a dense model has no routing: name one with experts")
    if len(handles) != 1:
        raise RecipeError(f"--routing takes one checkpoint with experts, and {len(handles)} are named")
    (handle,) = handles
    recipe = resolve_recipe(handle, resolve.read(None, overrides))
    policy = only_capacity(recipe, "paper")
    context = build_eval_context(recipe)
    console.message(f"measuring {handle.path}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        model = load_model(handle, context.device)
        evaluator = build_eval_data(handle, recipe, context, console).evaluators[0]
        texts = {**named_texts(evaluator.texts), **evaluator.targets}
        group = model.spec.group_sequences
        counts_by_text = {}
        for name, text in texts.items():
            batches = rank_batches(text, -(-BATCH_ROWS // group) * group, 0, 1)
            tracked = console.track(batches, f"reading {name}", len(batches))
            counts_by_text[name] = count_routing(model, tracked, text.is_packed, context, policy)
        layers = {
            layer: specialization_metrics(
                {name: counts[layer] for name, counts in counts_by_text.items()}, handle.tokenizer
            )
            for layer in model.spec.sparse_layer_names()
        }
        context.close()
        return {
            "checkpoint": str(handle.path),
            "step": handle.step,
            "capacity": policy,
            "num_experts": handle.spec.num_experts,
            "recipe": recipe.model_dump(mode="json"),
            "sequences": {name: text.num_rows for name, text in texts.items()},
            "rare": MIN_COUNT,
            "layers": layers,
            **machine_info(context),
        }
