"""Remove the experts that held-out text uses least, and measure the loss in quality."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.checkpoint import tensor_file
from switchcli.checkpoint.model_weights import logical_tensors, meta_model
from switchcli.errors import CheckpointError, DataError, RecipeError
from switchcli.metric_names import BITS_PER_BYTE, NEG_LOG_PERPLEXITY
from switchcli.model.config import STACKS, ModelSpec
from switchcli.model.flops import count
from switchcli.model.surgery import prune as pruning
from switchcli.recipe import resolve
from switchcli.runs.devices.mesh_choice import build_eval_context
from switchcli.runs.evaluate.eval_data import build_eval_data
from switchcli.runs.evaluate.eval_job import only_capacity, resolve_recipe
from switchcli.runs.inputs.loading import empty_model, load_model, open_model
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    next_command,
    publish_checkpoint,
    trained_documents,
)
from switchcli.runs.models.upcycling import with_experts
from switchcli.terminal.console import Console
from switchcli.training import memory


def prune(
    checkpoint: Path,
    destination: Path,
    name: str | None,
    overrides: Sequence[str],
    console: Console,
    *,
    experts: int,
) -> dict[str, Any]:
    """Write the smaller model to `destination`, and return the JSON result.

    It has `experts` experts per layer. Both models are measured on the same text, by the evaluation recipe `name` with
    `overrides`.

    Raises:
        CheckpointError: there is no such model at `checkpoint`, or the disk cannot be written.
        RecipeError: as `resolve_recipe` says, or the number of experts is not possible.
        DataError: the data to measure on cannot be used.
        OutOfMemory: the device has not enough memory.
    """
    handle = open_model(checkpoint, console)
    recipe = resolve_recipe(handle, resolve.read(name, overrides))
    spec = handle.spec
    _check_experts(spec, handle.path, experts, console)
    policy = only_capacity(recipe, "dropless")  # as a pruned model is served
    path = check_checkpoint_destination(checkpoint, destination)
    pruned_file = with_experts(handle.model_file, handle.path, experts)
    trained = trained_documents(handle, pruned_file.model, path)
    context = build_eval_context(recipe)
    if context.world > 1:
        raise RecipeError(f"prune works in one process, and there are {context.world} ranks: start it by itself")
    console.message(f"measuring {handle.path}")
    with memory.explain_out_of_memory_in_evaluation(context.device):
        original = load_model(handle, context.device)
        data = build_eval_data(handle, recipe, context, console)
        evaluator = data.evaluators[0]._replace(tasks=(), capacity=policy)
        with pruning.probability_mass(original) as mass:
            measured = evaluator(original)
        before = measured.parts()
        if not before:
            raise DataError(f"{handle.path}: no labeled example in what it is measured on: name text or other tasks")
        layer_plans = pruning.plan_pruning(original, measured.load(), mass, experts)
        pruned = empty_model(pruned_file, context.device)
        pruning.prune(original, layer_plans, pruned)
        after = evaluator(pruned).parts()
    publish_checkpoint(
        path,
        pruned_file,
        handle.tokenizer,
        logical_tensors(pruned),
        trained,
    )
    context.close()
    return {
        "source": str(handle.path),
        "destination": str(destination),
        "capacity": policy,
        "experts": {"before": spec.num_experts, "after": pruned_file.model.num_experts},
        "parameters": {"before": count(spec).parameters, "after": count(pruned_file.model).parameters},
        "bytes": {"before": _num_bytes(spec), "after": _num_bytes(pruned_file.model)},
        "held_out": {
            name: {
                "sequences": metrics["sequences"],
                "before": metrics[NEG_LOG_PERPLEXITY],
                "after": after[name][NEG_LOG_PERPLEXITY],
                "bits_per_byte": {"before": metrics.get(BITS_PER_BYTE), "after": after[name].get(BITS_PER_BYTE)},
            }
            for name, metrics in before.items()
        },
        "next": next_command(destination, trained),
        "layers": {name: plan._asdict() for name, plan in layer_plans.items()},
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
            f"--experts ({experts}): {path} has {num_experts} experts: --experts must be lower, for example "
            f"{num_experts // 2}"
        )
    if any(spec.sparse_layers(stack) and spec.router_of(stack).experts_choose for stack in STACKS):
        console.warning("expert_choice gives all experts of a layer the same load: the first ones are kept")


def _num_bytes(spec: ModelSpec) -> int:
    """Return the bytes of a model's weights in a checkpoint."""
    return tensor_file.num_bytes(logical_tensors(meta_model(spec)).values())
