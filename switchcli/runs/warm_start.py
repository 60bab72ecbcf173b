"""Resolve a recipe with the checkpoint that its run starts from, and load that checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec
from switchcli.recipe import resolve
from switchcli.recipe.schema import StartedRecipe, TextRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.report.console import Console
from switchcli.runs import branching
from switchcli.runs.branching import Branch
from switchcli.runs.loading import CheckpointHandle, open_model, read_documents, saved_recipe
from switchcli.training.checkpointer import load_optimizer_state, load_weights
from switchcli.training.config import StartSpec
from switchcli.training.optimizers import Optimizer

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
    branch: CheckpointHandle | None = None
    """The checkpoint of the run that this one is branched from. None for no branch, and for one that resumes."""


def resolve_job(
    name: str | None,
    overrides: Sequence[str],
    model: str | None,
    out: Path,
    resume: bool,
    console: Console,
    schema: type[R],
    branch_from: str | None = None,
) -> TrainJob[R]:
    """Resolve the recipe `name`, or the overrides alone. The checkpoint to start from provides the model's defaults.

    `model` is the checkpoint of the command line, which wins over the recipe's. A run in `out` keeps its start, even if
    the folder that `model` names has newer checkpoints by now. `branch_from` is RUN or RUN@STEP of the command line:
    the checkpoint of another run to continue.

    Raises:
        RecipeError: the verb needs a checkpoint to start from and none is named, or the recipe would change the shape
            of its weights.
        CheckpointError: there is no such checkpoint, or it has no optimizer state to carry over.
    """
    tree = resolve.load(name, overrides)
    resolve.check_verb(tree, schema)
    begun_recipe = run_recipe(out) if resume else None
    named = branching.named_start(model, branch_from, tree)
    branch = branching.find(schema.model_fields["verb"].default, named, begun_recipe, out, console)
    if branch is not None:
        return _branched_job(name, overrides, branch, schema)
    if named is None:
        if schema.model_fields["start"].is_required():
            raise RecipeError(f"{_START_KEY}: missing: name the model to start from by --model CHECKPOINT")
        return TrainJob(resolve.validate(tree, schema, _vocab_size(tree, schema, begun_recipe)), None)
    begun = _begun_recipe(begun_recipe, named.checkpoint, schema)
    if begun is not None and begun.start is not None:
        start, spec, path, sha256 = None, begun.model, begun.start.checkpoint, begun.start.sha256
    else:
        recorded = _recorded_start(out, named.checkpoint, console) if resume and begun_recipe is None else None
        start = _open(recorded or named.checkpoint, console, named.in_recipe)
        check_outside(_START_KEY, start.path, out)
        spec, path, sha256 = start.recipe.model, str(start.path), branching.digest(named, start)
    pinned = [resolve.override(_START_KEY, path), resolve.override("start.sha256", sha256)]
    defaults = resolve.layer({"model": spec.model_dump(mode="json")}, f"the checkpoint {path}")
    tree = resolve.load(name, [*overrides, *pinned], defaults)
    recipe = resolve.validate(tree, schema, spec.vocab_size)
    check_shape(spec, recipe.model, path)
    if start is not None:
        check_tokenizer(recipe, start.tokenizer)
        has_optimizer_state = start.native is not None and start.native.tensor_specs("optimizer")
        if not has_optimizer_state and recipe.start is not None and recipe.start.keep == "optimizer":
            raise CheckpointError(
                f"{path}: holds no optimizer state to carry over: start.keep=weights begins with a new one"
            )
    return TrainJob(recipe, start)


def _vocab_size(tree: Node, schema: type[R], begun: TrainingRecipe | None) -> int | None:
    """Return the number for `model.vocab_size: auto` in a run from scratch; None where the recipe itself says it.

    A run that has begun keeps its number with its tokenizer. Otherwise a tokenizer that is not to be trained is read.

    Raises:
        RecipeError: the recipe breaks a rule.
        DataError: the tokenizer cannot be read.
    """
    if not resolve.has_auto_vocab_size(tree):
        return None
    recipe = resolve.validate(tree, schema)
    if not isinstance(recipe, TextRecipe):
        return None
    tokenizer = recipe.data.tokenizer
    if isinstance(begun, TextRecipe) and begun.data.tokenizer == tokenizer:
        return begun.model.vocab_size
    return None if tokenizer.kind == "train" else resolve.padded_vocab_size(tokenizer.load(dict).vocab_size)


def _branched_job(name: str | None, overrides: Sequence[str], branch: Branch, schema: type[R]) -> TrainJob[R]:
    """Resolve the recipe of a branch. The model of the parent provides defaults.

    Raises:
        RecipeError: the recipe would change the shape of the weights.
    """
    model = branch.recipe.model
    defaults = resolve.layer({"model": model.model_dump(mode="json")}, f"the run of {branch.spec.checkpoint}")
    tree = resolve.load(name, [*overrides, *branching.overrides(branch)], defaults)
    recipe = resolve.validate(tree, schema, model.vocab_size)
    check_branch(branch, recipe)
    return TrainJob(recipe, None, branch.handle)


def check_branch(branch: Branch | None, recipe: TrainingRecipe) -> None:
    """Check that a run of `recipe` can continue the checkpoint, if it is a branch.

    Raises:
        RecipeError: the shape of the model or the tokenizer is another, or no step is left.
        DataError: the tokenizer that the recipe names cannot be read.
    """
    if branch is None:
        return
    check_shape(branch.recipe.model, recipe.model, branch.spec.checkpoint)
    branching.check(branch, recipe)
    if branch.handle is not None:
        check_tokenizer(recipe, branch.handle.tokenizer)


def load_start(
    settings: StartSpec,
    start: CheckpointHandle | None,
    weights: ModelWeights,
    optimizer: Optimizer,
    console: Console,
) -> None:
    """Load the weights, and with `keep: optimizer` the optimizer state, of a new run, and say where they are from.

    Raises:
        CheckpointError: as `load_optimizer_state` says.
    """
    assert start is not None, "a run that has begun restores its own checkpoint"
    console.message(f"starting from {start.path}")
    load_weights(weights, start.weights())
    if settings.keep == "weights":
        return
    assert start.native is not None, "refused when the recipe was resolved"
    load_optimizer_state(optimizer, start.native, weights.experts)


def start_tokenizer(job: TrainJob[Any], folder: RunFolder) -> Tokenizer:
    """Return the tokenizer of the checkpoint that the run starts from, continues as a branch, or resumes."""
    opened = job.branch or job.start
    if opened is not None:
        return opened.tokenizer
    if folder.tokenizer.exists():
        return Tokenizer.read(folder.tokenizer)
    latest = checkpoint.latest_read_only(folder.checkpoints, warn=lambda damage: None)
    assert latest is not None, "the run had begun when its recipe was resolved"
    return read_documents(latest)[1]


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


def _begun_recipe(recipe: TrainingRecipe | None, start: str, schema: type[R]) -> R | None:
    """Return `recipe`, that of a run that has begun, if it is of this verb and started from `start`, else None."""
    if not isinstance(recipe, schema) or recipe.start is None:
        return None
    return recipe if is_within(recipe.start.checkpoint, start) else None


def _recorded_start(out: Path, start: str, console: Console) -> str | None:
    """Return the start that recipe.yaml in `out` records for a run that has saved nothing yet, if it is in `start`.

    If that checkpoint is there no more, it is None, with a warning.
    """
    recipe = RunFolder(out).recipe
    if not recipe.is_file():
        return None
    try:
        recorded = resolve.stated_path(resolve.load(str(recipe)), _START_KEY)
    except RecipeError:  # of another program, or damaged
        return None
    if not isinstance(recorded, str) or not is_within(recorded, start):
        return None
    if not Path(recorded).exists():
        console.warning(f"{recipe}: its {_START_KEY}, {recorded}, is gone: the run starts from what {start} has now")
        return None
    return recorded
