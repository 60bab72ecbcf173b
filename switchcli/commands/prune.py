"""`switchcli prune`: a trained model with fewer experts, those that its own held-out text asks for least taken out."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.commands import evaluate
from switchcli.commands.upcycle import with_experts
from switchcli.distributed.context import Runtime
from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.metric_names import NEG_LOG_PERPLEXITY
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.moe.router import Policy
from switchcli.model.surgery import prune as pruning
from switchcli.model.surgery.prune import By, Gate
from switchcli.recipe.schema import EvalRecipe
from switchcli.report.console import Console
from switchcli.runs.evaluator import Evaluator
from switchcli.runs.loading import filled, unfilled
from switchcli.runs.new_folder import data_of, free_for_checkpoint, going_on, next_command, place_checkpoint
from switchcli.runs.run_dir import program
from switchcli.train import memory
from switchcli.train.checkpointer import logical_tensors


class Options(NamedTuple):
    """The options of `switchcli prune`."""

    experts: int
    by: By
    gate: Gate
    sequences: int | None
    """Rows of text, and examples of each task, that are looked at; None: as the recipe says."""


def prune(
    checkpoint: Path,
    destination: Path,
    arguments: Sequence[str],
    options: Options,
    console: Console,
) -> dict[str, Any]:
    """Write the smaller model at `destination`, measured before and after on the same batches.

    Raises:
        CheckpointError: there is no sparse model at `checkpoint`, or the disk refuses.
        RecipeError: as `evaluate.resolve_job`; or so many experts cannot be kept.
        DataError: of what it is measured on.
        OutOfMemory: the device has no room.
    """
    recipe, opened = evaluate.resolve_job(checkpoint, arguments, console)
    _check(opened.recipe.model, opened.path, options.experts, console)
    policy, recipe = _measured_by(recipe, options.sequences)
    smaller = with_experts(opened, options.experts)
    destination = free_for_checkpoint(checkpoint, destination)
    runtime = Runtime(recipe.device, recipe.precision)
    if runtime.world > 1:
        raise RecipeError(f"prune works in one process, and there are {runtime.world} ranks: start it by itself")
    console.message(f"measuring {opened.path}")
    with memory.explained_of_evaluation(runtime.device):
        loaded = filled(opened, runtime.device)
        evaluator = Evaluator(loaded, recipe, runtime, console)
        with pruning.probability_mass(loaded.model) as mass:
            before = evaluator.held_out(loaded.model, policy).named()
        if not before:
            raise DataError(f"{opened.path}: no labelled example in what it is measured on: name text or other tasks")
        cuts = pruning.cuts(loaded.model, _loads(before), mass, options.experts, options.gate)
        pruned = unfilled(smaller, runtime.device)
        pruning.prune(loaded.model, cuts, pruned, options.by)
        after = evaluator.held_out(pruned, policy).named()
    recipe_of_it = going_on(smaller, destination)
    place_checkpoint(destination, recipe_of_it, opened.tokenizer, logical_tensors(pruned), data_of(opened))
    runtime.close()
    figure = NEG_LOG_PERPLEXITY
    return {
        "source": str(opened.path),
        "destination": str(destination),
        "by": options.by,
        "gate": options.gate,
        "capacity": policy,
        "experts": {"before": opened.recipe.model.num_experts, "after": options.experts},
        "parameters": {"before": count(opened.recipe.model).parameters, "after": count(smaller.model).parameters},
        "held_out": {
            name: {"sequences": one["sequences"], "before": one[figure], "after": after[name][figure]}
            for name, one in before.items()
        },
        "next": next_command(smaller, destination),
        "layers": {layer: {**one._asdict(), "wo": float(one.wo)} for layer, one in cuts.items()},
    }


def show(result: Mapping[str, Any]) -> None:
    """The figures on stdout."""
    console = Console(stream=sys.stdout)
    headings = ("", "before", "after")
    rows = [[name, *(f"{result[name][when]:,}" for when in headings[1:])] for name in ("experts", "parameters")]
    for name, one in result["held_out"].items():
        rows.append([f"neg. log perplexity of {name}", *(f"{one[when]:.4f}" for when in headings[1:])])
    console.rows(f"{result['destination']}: by {result['by']}, capacity {result['capacity']}", headings, rows)
    layers = result["layers"].items()
    console.rows(
        "tokens whose expert is gone",
        ("layer", "share", "wo times", "kept"),
        (
            [name, f"{one['lost_fraction']:.1%}", f"{one['wo']:.3f}", " ".join(map(str, one["kept"]))]
            for name, one in layers
        ),
    )
    console.message()
    console.message(f"Next: {program()} {result['next']}")


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
