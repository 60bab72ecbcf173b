"""Make a Switch model whose experts are copies of a dense model's feed-forwards (Komatsuzaki et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import STACKS
from switchcli.model.surgery.upcycle import Gate, UpcycledWeights, gate_correction
from switchcli.recipe import resolve
from switchcli.recipe.sizes import CUSTOM
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.runs.loading import CheckpointHandle, open_model
from switchcli.runs.new_folder import (
    check_checkpoint_destination,
    continuation_recipe,
    data_document,
    next_command,
    publish_checkpoint,
)
from switchcli.runs.transformers_checkpoint import meta_model
from switchcli.runs.warm_start import NEW
from switchcli.train.checkpointer import logical_tensors

MAY_CHANGE = ("model.sparse", *(f"model.{key}" for key in NEW[1:]), "train.")
"""How keys begin that leave the weights what they are."""


def upcycle(
    dense: Path,
    destination: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    experts: int,
    gate: Gate,
    noise: float,
    seed: int,
) -> dict[str, Any]:
    """Write the sparse model with so many `experts` a layer at `destination`, and return its description.

    Normal noise is added to each expert's weights, with a standard deviation of `noise` times their root mean square.
    The `seed` is that of the routers and the noise.

    Raises:
        CheckpointError: `dense` is no dense model, or the disk refuses.
        RecipeError: the experts have no place in it, or a key would change what the weights are of.
    """
    opened = open_model(dense, console)
    if (there := opened.recipe.model.num_experts) > 1:
        raise CheckpointError(f"{opened.path}: has {there} experts already: name a dense model")
    if experts < 2:
        raise RecipeError(f"--experts ({experts}) must be at least 2: a model of one expert is the dense one")
    if not 0 <= noise <= 1:
        raise RecipeError(f"--noise ({noise}) must be from 0 to 1: 0.01 is a hundredth of the weights' size")
    recipe = with_experts(opened, experts, overrides)
    spec = recipe.model
    if spec.sparse != "feed_forward":
        raise RecipeError(
            f"model.sparse ({spec.sparse}): a dense model has nothing that experts of an attention could be copies of: "
            "model.sparse=feed_forward"
        )
    stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
    factors = {stack: spec.router_of(stack).eval_capacity_factor for stack in stacks}
    if gate == "scaled" and any(factor != "dropless" for factor in factors.values()):
        console.warning(
            f"model.router.eval_capacity_factor ({factors[stacks[0]]}): new routers share tokens out unevenly, and one "
            "that is dropped is not as in the dense model: dropless keeps all"
        )
    destination = check_checkpoint_destination(dense, destination)
    weights = UpcycledWeights(opened.weights(), logical_tensors(meta_model(spec)), spec, gate, noise, seed)
    parameters = publish_checkpoint(
        destination, continuation_recipe(recipe, destination), opened.tokenizer, weights, data_document(opened)
    )
    found = {stack: gate_correction(spec.router_of(stack), experts, gate) for stack in stacks}
    exactly = not noise and recipe.train.precision != "bfloat16"  # whose routers' gates are rounded
    return {
        "source": str(opened.path),
        "destination": str(destination),
        "parameters": parameters,
        "experts": experts,
        "gate": gate,
        "noise": noise,
        "seed": seed,
        "layers": spec.sparse_layer_names(),
        "next": next_command(recipe, destination),
        "corrections": {stack: {**one._asdict(), "exact": one.exact and exactly} for stack, one in found.items()},
    }


def with_experts(opened: CheckpointHandle, experts: int, overrides: Sequence[str] = ()) -> TrainingRecipe:
    """The recipe of a checkpoint with so many experts. Raises RecipeError by its rules, and for what has to stay."""
    where = f"{opened.path} with {experts} experts"
    model = opened.recipe.model.model_copy(update={"num_experts": experts, "size": CUSTOM})
    same = opened.recipe.model_copy(update={"model": model, "description": where})
    tree = resolve.load(None, overrides, resolve.layer(same.model_dump(mode="json"), where))
    recipe = resolve.validate(tree, type(opened.recipe))
    for key, old, new in resolve.differences(same, recipe):
        if not key.startswith(MAY_CHANGE):
            raise RecipeError(
                f"{key}: is {old} in {where}, not {new}: leave it out; may be set: {', '.join(MAY_CHANGE)}"
            )
    return recipe
