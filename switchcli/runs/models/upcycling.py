"""Make a sparse model from copies of a dense model's feed-forwards, or their parts, or of a smaller model's experts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.errors import RecipeError
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.surgery.upcycle import CopyNoise, Gate, UpcycledWeights, correction_of, num_parts
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
from switchcli.runs.job.same_model import CHANGEABLE_MODEL_KEYS, check_shape
from switchcli.training.checkpointer import logical_tensors

_CHANGEABLE_KEYS = ("model.sparse", *(f"model.{key}" for key in CHANGEABLE_MODEL_KEYS[1:]), "train.", "parallel.")
"""Prefixes of the keys that no weight's shape or meaning depends on."""
_KEYS_OF_EXPERTS = ("model.expert_d_ff", "model.shared_d_ff")
"""Keys that no weight of a dense model depends on. Those of a sparse model do."""
ROUTER_NOISE = 0.01
"""Noise on copied router rows by default: of two equal experts about half of the tokens choose the copy."""


def upcycle(
    model: Path,
    destination: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    experts: int,
    gate: Gate,
    noise: CopyNoise,
) -> dict[str, Any]:
    """Write the sparse model with `experts` experts per layer to `destination`, and return the JSON result.

    It is made from the dense or the sparse `model`.

    Raises:
        CheckpointError: there is no model, or the disk cannot be written.
        RecipeError: the number of experts is not possible, or a key would change the shape of weights.
    """
    checkpoint = open_model(model, console)
    source = checkpoint.recipe.model
    _check_options(source, checkpoint.path, experts, noise)
    recipe = with_experts(checkpoint, experts, overrides)
    spec = recipe.model
    if source.num_experts > 1:
        check_shape(source.model_copy(update={"num_experts": experts}), spec, str(checkpoint.path))
        noise = noise._replace(router=ROUTER_NOISE if noise.router is None else noise.router)
    else:
        _check_copies_of_feed_forwards(spec, experts)
        _check_choices(spec, gate)
    # Stacks that share a router have one warning.
    warnings = [_drops_warning(spec, gate, checkpoint.path)]
    warnings += [_choices_warning(source, spec, stack) for stack in spec.sparse_stacks]
    for warning in filter(None, dict.fromkeys(warnings)):
        console.warning(warning)
    path = check_checkpoint_destination(model, destination)
    names = logical_tensors(meta_model(spec))
    weights = UpcycledWeights(checkpoint.weights(), source, names, spec, gate, noise)
    parameters = publish_checkpoint(
        path, continuation_recipe(recipe, path), checkpoint.tokenizer, weights, data_document(checkpoint)
    )
    corrections = {stack: correction_of(source, spec, stack, gate) for stack in spec.sparse_stacks}
    # bfloat16 routers round their gates
    can_be_exact = not (noise.experts or noise.redraw or noise.router) and recipe.train.precision != "bfloat16"
    return {
        "source": str(checkpoint.path),
        "destination": str(path),
        "parameters": parameters,
        "experts": experts,
        "parts": num_parts(spec) if source.num_experts == 1 else 1,
        "gate": gate,
        "noise": noise.experts,
        "redraw": noise.redraw,
        "router_noise": noise.router,
        "seed": noise.seed,
        "layers": spec.sparse_layer_names(),
        "next": next_command(checkpoint, recipe, destination),
        "corrections": {
            stack: {
                **correction._asdict(),
                "exact": correction.exact and can_be_exact,
                "exact_without_noise": correction.exact,
            }
            for stack, correction in corrections.items()
        },
    }


def _check_options(source: ModelSpec, path: Path, experts: int, noise: CopyNoise) -> None:
    """Raise RecipeError unless the model at `path` can get so many experts with this noise."""
    before = source.num_experts
    if before == 1 and experts < 2:
        raise RecipeError(f"--experts ({experts}) must be at least 2: a model of one expert is the dense one")
    if before > 1 and (experts <= before or experts % before):
        fewer = "" if experts >= before else ", or take fewer by `switchcli prune`"
        raise RecipeError(
            f"--experts ({experts}) must be a multiple of the {before} of {path}, which all get as many copies: try "
            f"{before * max(2, round(experts / before))}{fewer}"
        )
    if before == 1 and noise.router is not None:
        raise RecipeError(f"--router-noise: {path} is dense, and new routers are no copies: leave it out")
    for option, value in (("noise", noise.experts), ("redraw", noise.redraw), ("router-noise", noise.router or 0)):
        if not 0 <= value <= 1:
            raise RecipeError(f"--{option} ({value}) must be from 0 to 1: 0.01 is a hundredth of the weights")


def _check_copies_of_feed_forwards(spec: ModelSpec, experts: int) -> None:
    """Raise RecipeError unless the experts of the sparse model can be copies of dense feed-forwards, or their parts."""
    if spec.sparse != "feed_forward":
        raise RecipeError(
            f"model.sparse ({spec.sparse}): experts can only be copies of feed-forwards: set model.sparse=feed_forward"
        )
    if spec.shared_d_ff:
        raise RecipeError(f"model.shared_d_ff ({spec.shared_d_ff}): a dense model has no weights for it: set it to 0")
    parts = num_parts(spec)
    if parts * spec.expert_width != spec.d_ff:
        divides = max(width for width in range(1, min(spec.expert_width, spec.d_ff) + 1) if spec.d_ff % width == 0)
        raise RecipeError(
            f"model.expert_d_ff ({spec.expert_width}) must divide model.d_ff ({spec.d_ff}), as experts are equal parts "
            f"of feed-forwards: try {divides}"
        )
    if parts == 1:
        return
    if experts % parts or experts < 2 * parts:
        raise RecipeError(
            f"--experts ({experts}) must be a multiple of the {parts} parts of a feed-forward, for two copies or more: "
            f"try {parts * max(2, round(experts / parts))}"
        )
    for stack in STACKS:
        router, key = spec.router_of(stack), spec.router_key(stack)
        # Otherwise gates would have to be made equal, and a router that chooses by them could not tell copies apart.
        is_whole = router.gates_sum_to_one and router.experts_per_token % parts == 0
        if spec.sparse_layers(stack) and not is_whole:
            raise RecipeError(
                f"{key}: each token must choose a multiple of the {parts} parts of a feed-forward, with gates that add "
                f"up to 1: set {key}.kind=top_k {key}.k={parts} {_room(key, parts)}"
            )


def _check_choices(spec: ModelSpec, gate: Gate) -> None:
    """Raise RecipeError if new routers would begin with equal gates, and biases choose by these."""
    for stack in STACKS:
        router, key = spec.router_of(stack), spec.router_key(stack)
        has_equal_gates = gate == "scaled" and not router.gates_sum_to_one
        if spec.sparse_layers(stack) and has_equal_gates and router.choice_bias_rate is not None:
            raise RecipeError(
                f"{key}.balance (bias): with --gate scaled all gates begin equal, so that biases would send all tokens "
                f"to one expert after another: take {key}.balance=loss or --gate raw"
            )


def _drops_warning(spec: ModelSpec, gate: Gate, path: Path) -> str | None:
    """Return a warning if the start could be exact, and tokens that are dropped make it differ."""
    dropping = [stack for stack in spec.sparse_stacks if spec.router_of(stack).eval_capacity_factor != "dropless"]
    if gate == "raw" or not dropping:
        return None
    key, factor = spec.router_key(dropping[0]), spec.router_of(dropping[0]).eval_capacity_factor
    return (
        f"{key}.eval_capacity_factor ({factor}): the copies share tokens unevenly, and the output of a "
        f"dropped token differs from that of {path}: dropless keeps all tokens"
    )


def _choices_warning(source: ModelSpec, grown: ModelSpec, stack: Stack) -> str | None:
    """Return a warning if tokens will choose several copies of one expert instead of as many experts as before."""
    before, after = (spec.router_of(stack).experts_per_token for spec in (source, grown))
    growth = grown.num_experts // source.num_experts
    if source.num_experts == 1 or before == 1 or after == before * growth:
        return None
    key, k = grown.router_key(stack), before * growth
    return (
        f"{key}.k ({after}): a token will choose copies of the same experts: {key}.k={k} {_room(key, k)} keep the "
        f"outputs, at {growth} times the experts' FLOPs"
    )


def _room(key: str, k: int) -> str:
    """Return the keys of a router with which all of k choices have room."""
    return f"{key}.capacity_factor={1.25 * k:g} {key}.eval_capacity_factor={2 * k} {key}.keep_threshold=0"


def with_experts(handle: CheckpointHandle, experts: int, overrides: Sequence[str] = ()) -> TrainingRecipe:
    """Return the recipe of a checkpoint with another number of experts, and with the overrides.

    Raises:
        RecipeError: the recipe breaks a rule, or an override would change the shape of weights.
    """
    where = f"{handle.path} with {experts} experts"
    model, parallel = handle.recipe.model, handle.recipe.parallel
    model = model.model_copy(update={"num_experts": experts, "size": CUSTOM})
    parallel = parallel.model_copy(update={"expert": math.gcd(parallel.expert, experts)})  # which must divide both
    description = f"{experts} experts in each sparse layer, of a model that had {handle.recipe.model.num_experts}"
    without_overrides = handle.recipe.model_copy(
        update={"model": model, "parallel": parallel, "description": description}
    )
    tree = resolve.load(None, overrides, resolve.layer(without_overrides.model_dump(mode="json"), where))
    recipe = resolve.validate(tree, type(handle.recipe))
    is_dense = handle.recipe.model.num_experts == 1
    changeable = (*_CHANGEABLE_KEYS, *(_KEYS_OF_EXPERTS if is_dense else ()))
    for key, old, new in resolve.differences(without_overrides, recipe):
        if not key.startswith(changeable):
            raise RecipeError(
                f"{key}: is {old} in {where}, not {new}: leave it out; may be set: {', '.join(changeable)}"
            )
    return recipe
