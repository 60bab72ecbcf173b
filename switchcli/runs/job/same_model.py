"""What a run that starts from a checkpoint must not change: the shape of its model, and its tokenizer."""

import json

from switchcli.data.tokenizer.tokenizer import Tokenizer, TrainedTokenizer
from switchcli.errors import RecipeError
from switchcli.model.config import CHANGEABLE_MODEL_KEYS, STACKS, ModelSpec
from switchcli.recipe import resolve
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.inputs.trained_recipe import trained_recipe
from switchcli.terminal.safe_text import shell_words


def check_shape(before: ModelSpec, after: ModelSpec, path: str) -> None:
    """Raise RecipeError if a model of `after` cannot use the weights at `path`, which are those of `before`."""
    for key, old, new in resolve.differences(before, after):
        if key.split(".")[0] not in CHANGEABLE_MODEL_KEYS:
            raise RecipeError(
                f"model.{key}: the recipe says {new}, the weights of {path} are of {old}: leave it out; of the model a "
                f"run that starts from them may change {', '.join(CHANGEABLE_MODEL_KEYS[1:])}"
            )
    for stack in STACKS:
        if not before.sparse_layers(stack):
            continue
        old_router, new_router = before.router_of(stack), after.router_of(stack)
        key = after.router_key(stack)
        if old_router.has_sigmoid_gates != new_router.has_sigmoid_gates:
            gate = "sigmoid" if old_router.has_sigmoid_gates else "softmax"
            raise RecipeError(f"{key}.gate: another one than that of the weights of {path}: set {key}.gate={gate}")
        if (old_scale := before.scale_of_experts(stack)) != (scale := after.scale_of_experts(stack)):
            raise RecipeError(
                f"{key}: with its gates the outputs of experts are multiplied by {scale:g} (model.expert_scale), and "
                f"with those of the weights of {path} by {old_scale:g}: keep their kind and renormalize"
            )
        if old_router.choice_bias_rate and not new_router.choice_bias_rate:
            raise RecipeError(
                f"{key}.balance: the routers of {path} choose by biases, which balance: loss would drop: "
                f"set {key}.balance=bias"
            )


def check_num_experts(tree: Node, before: int, path: str) -> None:
    """Raise RecipeError if the recipe `tree` names another number of experts than the weights at `path` have.

    It comes before the rules of the recipe, which ask for the batch and the capacity of a model that cannot be.
    """
    named = tree.stated("model.num_experts")
    if not isinstance(named, int) or named < 1 or named == before:
        return
    fix = "leave it out"
    if before == 1:
        fix += f", or make such a model by `switchcli upcycle {shell_words(path, 'FOLDER')} --experts {named}`"
    elif 1 < named < before:
        fix += f", or make such a model by `switchcli prune {shell_words(path, 'FOLDER')} --experts {named}`"
    raise RecipeError(f"model.num_experts ({named}): the weights of {path} are of {before}: {fix}")


def check_tokenizer(recipe: TrainingRecipe, tokenizer: Tokenizer) -> None:
    """Check that the recipe does not name another tokenizer than that of the weights.

    A tokenizer that the recipe would train is replaced by that of the weights, so it is not checked.

    Raises:
        RecipeError: the tokenizers differ.
        DataError: the tokenizer that the recipe names cannot be read.
    """
    named = recipe.tokenizer
    if named is not None and named.kind != "train" and named.load().sha256 != tokenizer.sha256:
        raise RecipeError(
            f"data.tokenizer: {named.path} is not the tokenizer that the weights were trained with: leave it out"
        )


def check_trained_tokenizer(tree: Node, handle: CheckpointHandle) -> None:
    """Raise RecipeError if the recipe `tree` would train another tokenizer than the checkpoint's, which it takes."""
    tokenizer, run = handle.tokenizer, trained_recipe(handle)
    trained = run and run.tokenizer
    properties = {
        "vocab_size": tokenizer.vocab_size,
        "num_sentinels": len(tokenizer.sentinels),
        "byte_fallback": bool(tokenizer.is_byte_V.any()),
    }
    for name, value in properties.items():
        key = f"data.tokenizer.{name}"
        # The text of a small corpus may give fewer pieces than its recipe asked for. A run's recipe.yaml has defaults.
        accepted = (None, value, getattr(trained, name, value), TrainedTokenizer.model_fields[name].default)
        if (named := tree.stated(key)) not in accepted:
            raise RecipeError(
                f"{key} ({json.dumps(named)}): the tokenizer is that of {handle.path}: leave {key} out, or take "
                f"{key}={json.dumps(value)}"
            )
