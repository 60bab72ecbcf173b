"""Make a sparse model from copies of a dense model's feed-forwards, or of their parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchcli.checkpoint.documents import ModelFile
from switchcli.checkpoint.model_weights import logical_tensors, meta_model
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import CHANGEABLE_MODEL_KEYS, STACKS, ModelSpec, capacity_rules
from switchcli.model.surgery.upcycle import UpcycledWeights, gate_correction, num_parts
from switchcli.recipe import resolve
from switchcli.recipe.sizes import CUSTOM
from switchcli.runs.inputs.loading import open_model
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    next_command,
    publish_checkpoint,
    trained_documents,
)
from switchcli.spec import Spec
from switchcli.terminal.console import Console


class _Upcycled(Spec):
    """What KEY=VALUE of the command may set."""

    model: ModelSpec


resolve.SCHEMAS.append(_Upcycled)
_CHANGEABLE_KEYS = (
    "model.sparse",
    *(f"model.{key}" for key in CHANGEABLE_MODEL_KEYS[1:]),
    "model.expert_d_ff",
    "model.shared_d_ff",
)
"""Prefixes of the keys that no weight of a dense model depends on."""


def upcycle(
    model: Path,
    destination: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    experts: int,
    noise: float,
    seed: int,
) -> dict[str, Any]:
    """Write the sparse model with `experts` experts per layer to `destination`, and return the JSON result.

    It is made from the dense `model`. `noise` and `seed` are those of `UpcycledWeights`.

    Raises:
        CheckpointError: there is no such model, or the disk cannot be written.
        RecipeError: the number of experts is not possible, or a key would change the shape of weights.
    """
    checkpoint = open_model(model, console)
    num_experts = checkpoint.spec.num_experts
    if num_experts > 1:
        raise CheckpointError(f"{checkpoint.path}: has {num_experts} experts already: name a dense model")
    if experts < 2:
        raise RecipeError(f"--experts ({experts}) must be at least 2: a model of one expert is the dense one")
    if not 0 <= noise <= 1:
        raise RecipeError(f"--noise ({noise}) must be from 0 to 1: 0.01 is a hundredth of the weights")
    file = with_experts(checkpoint.model_file, checkpoint.path, experts, overrides)
    spec = file.model
    _check_copies_of_feed_forwards(spec, experts)
    _check_choices(spec)
    _warn_about_drops(spec, checkpoint.path, console)
    path = check_checkpoint_destination(model, destination)
    names = logical_tensors(meta_model(spec))
    weights = UpcycledWeights(checkpoint.weights(), names, spec, noise, seed)
    trained = trained_documents(checkpoint, spec, path)
    parameters = publish_checkpoint(path, file, checkpoint.tokenizer, weights, trained)
    corrections = {stack: gate_correction(spec, stack) for stack in spec.sparse_stacks}
    # bfloat16 routers round their gates
    can_be_exact = not noise and file.precision != "bfloat16"
    return {
        "source": str(checkpoint.path),
        "destination": str(destination),
        "parameters": parameters,
        "experts": experts,
        "parts": num_parts(spec),
        "noise": noise,
        "seed": seed,
        "layers": spec.sparse_layer_names(),
        "next": next_command(destination, trained),
        "corrections": {
            stack: {
                **correction._asdict(),
                "exact": correction.exact and can_be_exact,
                "exact_without_noise": correction.exact,
            }
            for stack, correction in corrections.items()
        },
    }


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
                f"up to 1: set {key}.kind=top_k {key}.k={parts} {key}.capacity_factor={1.25 * parts:g} "
                f"{key}.eval_capacity_factor={2 * parts} {key}.keep_threshold=0"
            )


def _check_choices(spec: ModelSpec) -> None:
    """Raise RecipeError if new routers would begin with equal gates, and biases choose by these."""
    for stack in STACKS:
        router, key = spec.router_of(stack), spec.router_key(stack)
        if spec.sparse_layers(stack) and not router.gates_sum_to_one and router.choice_bias_rate is not None:
            raise RecipeError(
                f"{key}.balance (bias): all gates begin equal, so that biases would send all tokens to one expert "
                f"after another: take {key}.balance=loss"
            )


def _warn_about_drops(spec: ModelSpec, path: Path, console: Console) -> None:
    """Print a warning if tokens that are dropped make the start differ."""
    for stack in spec.sparse_stacks:
        key, factor = spec.router_key(stack), spec.router_of(stack).eval_capacity_factor
        if factor != "dropless":
            console.warning(
                f"{key}.eval_capacity_factor ({factor}): the copies share tokens unevenly, and the output of a "
                f"dropped token differs from that of {path}: dropless keeps all tokens"
            )
            return


def with_experts(file: ModelFile, path: Path, experts: int, overrides: Sequence[str] = ()) -> ModelFile:
    """Return model.json of the checkpoint at `path` with another number of experts, and with the overrides.

    Raises:
        RecipeError: the model breaks a rule, or an override would change the shape of weights.
    """
    where = f"{path} with {experts} experts"
    without_overrides = _Upcycled.model_construct(
        model=file.model.model_copy(update={"num_experts": experts, "size": CUSTOM})
    )
    tree = resolve.load(None, overrides, resolve.layer(without_overrides.model_dump(mode="json"), where))
    upcycled = resolve.validate(tree, _Upcycled)
    for key, old, new in resolve.differences(without_overrides, upcycled):
        if not key.startswith(_CHANGEABLE_KEYS):
            raise RecipeError(
                f"{key}: is {old} in {where}, not {new}: leave it out; may be set: {', '.join(_CHANGEABLE_KEYS)}"
            )
    if problems := [*capacity_rules(upcycled.model, file.inputs_length, file.targets_length)]:
        raise RecipeError(*problems)
    return file.model_copy(update={"model": upcycled.model})
