"""Make a sparse model whose experts are copies of a dense model's feed-forwards (Komatsuzaki et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import STACKS
from switchcli.model.surgery.upcycle import Gate, UpcycledWeights, gate_correction
from switchcli.recipe import resolve
from switchcli.recipe.sizes import CUSTOM
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.report.console import Console
from switchcli.runs.inputs.loading import CheckpointHandle, open_model
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    continuation_recipe,
    data_document,
    next_command,
    publish_checkpoint,
)
from switchcli.runs.inputs.transformers_checkpoint import meta_model
from switchcli.runs.job.same_model import CHANGEABLE_MODEL_KEYS
from switchcli.training.checkpointer import logical_tensors

_CHANGEABLE_KEYS = ("model.sparse", *(f"model.{key}" for key in CHANGEABLE_MODEL_KEYS[1:]), "train.")
"""Prefixes of the keys that do not change the shape or the meaning of weights."""


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
    """Write the sparse model with `experts` experts per layer to `destination`, and return the JSON result.

    Normal noise is added to each expert's weights, with a standard deviation of `noise` times their root mean square.
    `seed` is the seed of the new routers and the noise.

    Raises:
        CheckpointError: `dense` is not a dense model, or the disk cannot be written.
        RecipeError: the number of experts is not possible, or a key would change the shape of weights.
    """
    checkpoint = open_model(dense, console)
    num_experts = checkpoint.recipe.model.num_experts
    if num_experts > 1:
        raise CheckpointError(f"{checkpoint.path}: has {num_experts} experts already: name a dense model")
    if experts < 2:
        raise RecipeError(f"--experts ({experts}) must be at least 2: a model of one expert is the dense one")
    if not 0 <= noise <= 1:
        raise RecipeError(f"--noise ({noise}) must be from 0 to 1: 0.01 is a hundredth of the weights' size")
    recipe = with_experts(checkpoint, experts, overrides)
    spec = recipe.model
    if spec.sparse != "feed_forward":
        raise RecipeError(
            f"model.sparse ({spec.sparse}): experts can only be copies of feed-forwards: set model.sparse=feed_forward"
        )
    if keys := spec.uncommon_experts():
        raise RecipeError(f"model.{keys}: upcycled experts are copies of whole feed-forwards: leave out all of these")
    stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
    factors = {stack: spec.router_of(stack).eval_capacity_factor for stack in stacks}
    if gate == "scaled" and any(factor != "dropless" for factor in factors.values()):
        console.warning(
            f"model.router.eval_capacity_factor ({factors[stacks[0]]}): new routers distribute tokens unevenly, and "
            "the output of a dropped token differs from the dense model's: dropless keeps all tokens"
        )
    destination = check_checkpoint_destination(dense, destination)
    weights = UpcycledWeights(checkpoint.weights(), logical_tensors(meta_model(spec)), spec, gate, noise, seed)
    parameters = publish_checkpoint(
        destination, continuation_recipe(recipe, destination), checkpoint.tokenizer, weights, data_document(checkpoint)
    )
    corrections = {stack: gate_correction(spec.router_of(stack), experts, gate) for stack in stacks}
    can_be_exact = not noise and recipe.train.precision != "bfloat16"  # bfloat16 routers round their gates
    return {
        "source": str(checkpoint.path),
        "destination": str(destination),
        "parameters": parameters,
        "experts": experts,
        "gate": gate,
        "noise": noise,
        "seed": seed,
        "layers": spec.sparse_layer_names(),
        "next": next_command(recipe, destination),
        "corrections": {
            stack: {**correction._asdict(), "exact": correction.exact and can_be_exact}
            for stack, correction in corrections.items()
        },
    }


def with_experts(handle: CheckpointHandle, experts: int, overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Return the recipe of a checkpoint with another number of experts, and with the overrides.

    Raises:
        RecipeError: the recipe breaks a rule, or an override would change the shape of weights.
    """
    where = f"{handle.path} with {experts} experts"
    model = handle.recipe.model.model_copy(update={"num_experts": experts, "size": CUSTOM})
    description = f"{experts} experts in each sparse layer, of a model that had {handle.recipe.model.num_experts}"
    without_overrides = handle.recipe.model_copy(update={"model": model, "description": description})
    tree = resolve.load(None, overrides, resolve.layer(without_overrides.model_dump(mode="json"), where))
    recipe = resolve.validate(tree, type(handle.recipe))
    for key, old, new in resolve.differences(without_overrides, recipe):
        if not key.startswith(_CHANGEABLE_KEYS):
            raise RecipeError(
                f"{key}: is {old} in {where}, not {new}: leave it out; may be set: {', '.join(_CHANGEABLE_KEYS)}"
            )
    return recipe
