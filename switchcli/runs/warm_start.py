"""Resolve a recipe with the checkpoint that its run starts from, and load that checkpoint."""

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
from switchcli.report.console import Console
from switchcli.runs.loading import CheckpointHandle, open_model, read_documents, saved_recipe
from switchcli.train.checkpointer import load_optimizer_state, load_weights
from switchcli.train.config import StartSpec
from switchcli.train.optimizers import Optimizer

R = TypeVar("R", bound=StartedRecipe)

_START_KEY = "start.checkpoint"
CHANGEABLE_MODEL_KEYS = (
    "size",
    "dropout",
    "expert_dropout",
    "router",
    "decoder_router",
    "balance_reduction",
    "init_scale",
)
"""Keys of `model` that may differ from the checkpoint, because no weight's shape or meaning depends on them."""


class TrainJob(NamedTuple, Generic[R]):
    """The resolved command line of a verb that trains."""

    recipe: R
    start: CheckpointHandle | None
    """The checkpoint to start from. None for a run from scratch, and for one that resumes from its own checkpoints."""


def resolve_job(
    name: str,
    overrides: Sequence[str],
    model: str | None,
    out: Path,
    resume: bool,
    console: Console,
    schema: type[R],
) -> TrainJob[R]:
    """Resolve the recipe. The checkpoint that it starts from, if any, provides the defaults of its model.

    `model` is the checkpoint of the command line, which wins over the recipe's. A run in `out` that has begun keeps its
    start, even if the folder that `model` names has newer checkpoints by now.

    Raises:
        RecipeError: the verb needs a checkpoint to start from and none is named, or the recipe would change the shape
            of its weights.
        CheckpointError: there is no such checkpoint, or it has no optimizer state to carry over.
    """
    tree = resolve.load(name, overrides)
    resolve.check_verb(tree, schema)
    checkpoint_path = model or resolve.stated_path(tree, _START_KEY)
    if checkpoint_path is None and not schema.model_fields["start"].is_required():
        return TrainJob(resolve.validate(tree, schema), None)
    if not isinstance(checkpoint_path, str):
        raise RecipeError(f"{_START_KEY}: missing: name the model to start from by --model CHECKPOINT")
    begun = _begun_recipe(out, checkpoint_path, schema) if resume else None
    if begun is not None and begun.start is not None:
        spec, path, start = begun.model, begun.start.checkpoint, None
    else:
        start = _open(checkpoint_path, console, in_recipe=not model)
        spec, path = start.recipe.model, str(start.path)
        check_outside(_START_KEY, start.path, out)
    defaults = resolve.layer({"model": spec.model_dump(mode="json")}, f"the checkpoint {path}")
    tree = resolve.load(name, [*overrides, f"{_START_KEY}={json.dumps(path)}"], defaults)
    recipe = resolve.validate(tree, schema)
    check_shape(spec, recipe.model, path)
    if start is not None:
        check_tokenizer(recipe, start.tokenizer)
        has_optimizer_state = start.native is not None and start.native.tensor_specs("optimizer")
        if not has_optimizer_state and recipe.start is not None and recipe.start.optimizer == "carry":
            raise CheckpointError(
                f"{path}: holds no optimizer state to carry over: start.optimizer=reset begins with a new one"
            )
    return TrainJob(recipe, start)


def load_start(
    settings: StartSpec, start: CheckpointHandle | None, weights: ModelWeights, optimizer: Optimizer
) -> None:
    """Load the weights, and with `optimizer: carry` the optimizer state, of a new run.

    Raises:
        CheckpointError: as `load_optimizer_state` says.
    """
    assert start is not None, "a run that has begun restores its own checkpoint"
    load_weights(weights, start.weights())
    if settings.optimizer == "reset":
        return
    assert start.native is not None, "refused when the recipe was resolved"
    load_optimizer_state(optimizer, start.native, weights.experts)


def start_tokenizer(start: CheckpointHandle | None, folder: RunFolder, context: DistributedContext) -> Tokenizer:
    """Return the tokenizer of the checkpoint that the run starts from. Each checkpoint of the run holds a copy of it.

    A new run writes it into its folder.
    """
    if start is None:
        latest = checkpoint.latest_read_only(folder.checkpoints, warn=lambda damage: None)
        assert latest is not None, "the run had begun when its recipe was resolved"
        return read_documents(latest)[1]
    context.main_only(lambda: folder.write_tokenizer(start.tokenizer.to_json()))
    return start.tokenizer


def check_shape(before: ModelSpec, after: ModelSpec, path: str) -> None:
    """Raise RecipeError if a model of `after` cannot use the weights at `path`, which are those of `before`."""
    for key, old, new in resolve.differences(before, after):
        if key.split(".")[0] not in CHANGEABLE_MODEL_KEYS:
            raise RecipeError(
                f"model.{key}: the recipe says {new}, the weights of {path} are of {old}: leave it out; of the model a "
                f"run that starts from them may change {', '.join(CHANGEABLE_MODEL_KEYS[1:])}"
            )


def check_tokenizer(recipe: TrainingRecipe, tokenizer: Tokenizer) -> None:
    """Check that the recipe does not name another tokenizer than that of the weights.

    A tokenizer that the recipe would train is replaced by that of the weights, so it is not checked.

    Raises:
        RecipeError: the tokenizers differ.
        DataError: the tokenizer that the recipe names cannot be read.
    """
    if not isinstance(recipe, TextRecipe):
        return
    named = recipe.data.tokenizer
    if named.kind != "train" and named.load(dict).sha256 != tokenizer.sha256:
        raise RecipeError(
            f"data.tokenizer: {named.path} is not the tokenizer that the weights were trained with: leave it out"
        )


def check_outside(key: str, path: Path, out: Path) -> None:
    """Raise RecipeError if the checkpoint lies in the run's own folder, where the run may remove it."""
    if path.resolve().is_relative_to(out.resolve()):
        raise RecipeError(f"{key} ({path}): lies within the run's own folder {out}: give another folder by --out")


def _open(path: str, console: Console, in_recipe: bool) -> CheckpointHandle:
    """Open the checkpoint to start from. `in_recipe` says that the recipe names it, not the command line."""
    try:
        return open_model(Path(path), console)
    except CheckpointError as error:
        if not in_recipe:
            raise
        raise CheckpointError(f"{_START_KEY} of the recipe: {error}; or name another by --model CHECKPOINT") from error


def run_recipe(out: Path) -> TrainingRecipe | None:
    """Return the recipe of the run in `out`, or None if it has saved no checkpoint."""
    latest = checkpoint.latest_read_only(out / "checkpoints", warn=lambda damage: None)
    return None if latest is None else saved_recipe(latest)


def is_within(checkpoint: str, path: str) -> bool:
    """Return whether `path` is the checkpoint, or a folder that contains it."""
    return Path(checkpoint).resolve().is_relative_to(Path(path).resolve())


def _begun_recipe(out: Path, start: str, schema: type[R]) -> R | None:
    """Return the recipe of the run in `out` if it has saved a checkpoint and started from `start`, else None."""
    recipe = run_recipe(out)
    if not isinstance(recipe, schema) or recipe.start is None:
        return None
    return recipe if is_within(recipe.start.checkpoint, start) else None
