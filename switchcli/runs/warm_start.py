"""The checkpoint that a run starts from: found beside the recipe that it completes, and put into the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec
from switchcli.recipe import resolve
from switchcli.recipe.schema import StartedRecipe, TextRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.report.console import Console
from switchcli.runs.loading import CheckpointHandle, open_model, read_documents, saved_recipe
from switchcli.train.checkpointer import load_optimizer_state, load_weights
from switchcli.train.config import StartSpec
from switchcli.train.optimizers import Optimizer

R = TypeVar("R", bound=StartedRecipe)

KEY = "start.checkpoint"
NEW = ("size", "dropout", "expert_dropout", "router", "decoder_router", "balance_reduction", "init_scale")
"""Keys of `model` that a run may set anew: the weights are the same whatever they say."""


class TrainJob(NamedTuple, Generic[R]):
    """What a command line comes to."""

    recipe: R
    start: CheckpointHandle | None
    """None: from scratch, or the run in the folder has begun and goes on with its own checkpoints."""


def resolve_job(
    name: str,
    overrides: Sequence[str],
    model: str | None,
    out: Path,
    resume: bool,
    console: Console,
    schema: type[R],
) -> TrainJob[R]:
    """The recipe with what the checkpoint that it starts from, if it does, says of the model.

    A run that has begun keeps its start, even if the folder that `model` names has newer checkpoints by now.

    Raises:
        RecipeError: no checkpoint to start from is named where one is needed, or the recipe would change the shape of
            its weights.
        CheckpointError: there is no such checkpoint, or no optimizer state in it to carry over.
    """
    tree = resolve.load(name, overrides)
    resolve.check_verb(tree, schema)
    said = model or resolve.stated_place(tree, KEY)
    if said is None and not schema.model_fields["start"].is_required():
        return TrainJob(resolve.validate(tree, schema), None)
    if not isinstance(said, str):
        raise RecipeError(f"{KEY}: missing: name the model to start from by --model CHECKPOINT")
    begun = _begun(out, said, schema) if resume else None
    if begun is not None and begun.start is not None:
        spec, path, start = begun.model, begun.start.checkpoint, None
    else:
        start = _open(said, None if model else tree, console)
        spec, path = start.recipe.model, str(start.path)
        check_outside(KEY, start.path, out)
    below = resolve.layer({"model": spec.model_dump(mode="json")}, f"the checkpoint {path}")
    tree = resolve.load(name, [*overrides, f"{KEY}={json.dumps(path)}"], below)
    recipe = resolve.validate(tree, schema)
    check_shape(spec, recipe.model, path)
    if start is not None:
        check_tokenizer(recipe, start.tokenizer)
    bare = start is not None and (start.own is None or not start.own.tensor_specs("optimizer"))
    if bare and recipe.start is not None and recipe.start.optimizer == "carry":
        raise CheckpointError(
            f"{path}: holds no optimizer state to carry over: start.optimizer=reset begins with a new one"
        )
    return TrainJob(recipe, start)


def load_start(
    settings: StartSpec, start: CheckpointHandle | None, weights: ModelWeights, optimizer: Optimizer
) -> None:
    """Fill the weights, and perhaps the optimizer, of a run that begins. Raises CheckpointError as `carry_over`."""
    assert start is not None, "a run that has begun restores its own"
    load_weights(weights, start.weights())
    if settings.optimizer == "reset":
        return
    assert start.own is not None, "refused when the recipe was resolved"
    load_optimizer_state(optimizer, start.own, weights.experts)


def start_tokenizer(start: CheckpointHandle | None, folder: RunFolder, context: DistributedContext) -> Tokenizer:
    """That of the checkpoint which the run starts from; each checkpoint of the run has it again."""
    if start is None:
        found = checkpoint.latest_read_only(folder.checkpoints, warn=lambda damage: None)
        assert found is not None, "the run had begun when its recipe was resolved"
        return read_documents(found)[1]
    context.main_only(lambda: folder.write_tokenizer(start.tokenizer.to_json()))
    return start.tokenizer


def check_shape(before: ModelSpec, after: ModelSpec, path: str) -> None:
    """Raise a RecipeError where weights of the shape `before` would not be those of `after`."""
    for key, old, new in resolve.differences(before, after):
        if key.split(".")[0] not in NEW:
            raise RecipeError(
                f"model.{key}: the recipe says {new}, the weights of {path} are of {old}: leave it out; of the model a "
                f"run that starts from them may change {', '.join(NEW[1:])}"
            )


def check_tokenizer(recipe: TrainingRecipe, tokenizer: Tokenizer) -> None:
    """Refuse a recipe that names another vocabulary than that of the weights; one to be trained is not trained then.

    Raises:
        RecipeError: it does.
        DataError: the tokenizer that it names is not there.
    """
    said = recipe.data.tokenizer if isinstance(recipe, TextRecipe) else None
    if said is not None and said.kind != "train" and said.load(dict).sha256 != tokenizer.sha256:
        raise RecipeError(
            f"data.tokenizer: {said.path} is not the tokenizer that the weights were trained with: leave it out"
        )


def check_outside(key: str, path: Path, out: Path) -> None:
    """Raise a RecipeError for a checkpoint that the run itself may remove."""
    if path.resolve().is_relative_to(out.resolve()):
        raise RecipeError(f"{key} ({path}): lies within the run's own folder {out}: give another folder by --out")


def _open(said: str, tree: Node | None, console: Console) -> CheckpointHandle:
    """The checkpoint to start from; `tree` is the recipe that names it, if the command line does not."""
    try:
        return open_model(Path(said), console)
    except CheckpointError as error:
        if tree is None:
            raise
        raise CheckpointError(f"{KEY} of the recipe: {error}; or name another by --model CHECKPOINT") from error


def run_recipe(out: Path) -> TrainingRecipe | None:
    """The recipe of the run in `out`, if it has saved something."""
    found = checkpoint.latest_read_only(out / "checkpoints", warn=lambda damage: None)
    return None if found is None else saved_recipe(found)


def is_within(checkpoint: str, said: str) -> bool:
    """Whether `said` names that very checkpoint, or a folder that it is in."""
    return Path(checkpoint).resolve().is_relative_to(Path(said).resolve())


def _begun(out: Path, said: str, schema: type[R]) -> R | None:
    """The recipe of the run in `out`, if it has saved something and `said` names what it started from."""
    recipe = run_recipe(out)
    if not isinstance(recipe, schema) or recipe.start is None:
        return None
    return recipe if is_within(recipe.start.checkpoint, said) else None
