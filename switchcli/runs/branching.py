"""Branch a run: start a new run from a checkpoint of an existing one, with settings that a resume would refuse.

A branch continues the weights, the optimizer state, the steps and, if its data is that of the other run, the position
in the data. Its evaluations begin anew. The other run is only read, so it may be training.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.saved_state import BranchPoint
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe import resolve
from switchcli.recipe.resolve import Difference, differences
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.report.console import Console
from switchcli.report.safe_text import shell_words
from switchcli.runs.loading import CheckpointHandle, locate, open_model
from switchcli.training.checkpointer import load_optimizer_state, load_weights
from switchcli.training.config import StartSpec
from switchcli.training.optimizers import Optimizer
from switchcli.training.state import TrainState

OPTION = "--branch-from"
WEIGHTS_ONLY = "to take only its weights, start from it by --model and start.keep=weights"
_NAMES_OF_TEXT = ("data.tokenizer", "data.corpora", "data.folder")
"""Keys that say where the data is. A digest tells whether it is the same."""


class NamedStart(NamedTuple):
    """The checkpoint to start from, as the command line or a recipe that is not validated yet names it."""

    checkpoint: str
    """A checkpoint, a run, or, for a branch, RUN@STEP."""
    sha256: Any
    """The value of `start.sha256`."""
    is_branch: bool
    """Whether `start.keep` is `run`."""
    in_recipe: bool
    """Whether the recipe names it, not the command line."""


class Branch(NamedTuple):
    """The checkpoint that a run is branched from, as the command line or the recipe names it."""

    spec: StartSpec
    """The `start` key of the resolved recipe."""
    handle: CheckpointHandle | None
    """The open checkpoint. None for a run that has begun, which resumes from its own checkpoints."""
    recipe: TrainingRecipe
    """The recipe of the other run or, for a run that has begun, its own."""


def named_start(model: str | None, branch_from: str | None, tree: Node) -> NamedStart | None:
    """Return what `--model`, `--branch-from` or else the recipe `tree` names to start from; None for initial weights.

    Raises:
        RecipeError: both options are given, or `--model` with a recipe that continues a run.
    """
    keep = resolve.stated(tree, "start.keep")
    if model is not None and branch_from is not None:
        raise RecipeError(f"--model and {OPTION}: both name the checkpoint to start from: leave one out")
    if model is not None and keep == "run":
        raise RecipeError(f"--model ({model}): start.keep is run: name the run by {OPTION}, or take start.keep=weights")
    if branch_from is not None:
        return NamedStart(branch_from, None, is_branch=True, in_recipe=False)
    if model is not None:
        return NamedStart(model, None, is_branch=False, in_recipe=False)
    path = resolve.stated_path(tree, "start.checkpoint")
    if not isinstance(path, str):
        return None
    return NamedStart(path, resolve.stated(tree, "start.sha256"), is_branch=keep == "run", in_recipe=True)


def find(
    verb: str, named: NamedStart | None, begun: TrainingRecipe | None, out: Path, console: Console
) -> Branch | None:
    """Return the checkpoint to branch from, or None if the run is to be no branch.

    Args:
        verb: the command, which must have written the checkpoint.
        named: what the run is to start from.
        begun: the recipe of the run that is resumed in `out`. If it was branched from the same run, it keeps its
            checkpoint, even if that run has newer ones by now.
        out: the folder of the new run.
        console: gets warnings about damaged checkpoints.

    Raises:
        CheckpointError: there is no such checkpoint, it has no optimizer state, or it is not the recorded one.
        RecipeError: it lies in the folder of the new run, or is of another verb.
    """
    if named is None or not named.is_branch:
        return None
    run, step = parse(named.checkpoint)
    if begun is not None and begun.parent is not None and _is_same(begun.parent, run, step):
        return Branch(begun.parent, None, begun)
    handle = _open(run, step, console, named.in_recipe)
    if handle.path.resolve().is_relative_to(out.resolve()):
        raise RecipeError(f"{OPTION} {handle.path}: lies within the new run's own folder: give another one by --out")
    if handle.recipe.verb != verb:
        raise RecipeError(
            f"{OPTION} {named.checkpoint}: a run of {handle.recipe.verb}, which `switchcli {handle.recipe.verb}` can "
            f"branch; {WEIGHTS_ONLY}"
        )
    spec = StartSpec(checkpoint=str(handle.path), sha256=digest(named, handle), keep="run")
    return Branch(spec, handle, handle.recipe)


def digest(named: NamedStart, handle: CheckpointHandle) -> str | None:
    """Return the digest of the weights and the optimizer state, or None for a checkpoint of another layout.

    Raises:
        CheckpointError: the recipe names another digest.
    """
    sha256 = None
    if handle.native is not None:
        entries = [entry for entry in handle.native.manifest.entries if entry.name.endswith(".safetensors")]
        sha256 = hashlib.sha256(repr([(entry.name, entry.sha256) for entry in entries]).encode()).hexdigest()
    if named.sha256 not in (None, sha256):
        raise CheckpointError(
            f"{handle.path}: not the checkpoint that start.sha256 of the recipe names: it was saved again since, "
            "or is of another layout: take start.sha256=null to begin from what it holds now"
        )
    return sha256


def overrides(branch: Branch | None) -> list[str]:
    """Return the KEY=VALUE that records the checkpoint in the recipe."""
    values = {} if branch is None else branch.spec.model_dump(mode="json")
    return [resolve.override(f"start.{key}", value) for key, value in values.items()]


def parse(option: str) -> tuple[str, int | None]:
    """Return the path and the step of RUN[@STEP]. A path that exists as a whole has no step."""
    path, at, step = option.rpartition("@")
    if at and path and step.isascii() and step.isdecimal() and not Path(option).exists():
        return path, int(step)
    return option, None


def _is_same(begun: StartSpec, run: str, step: int | None) -> bool:
    """Return whether RUN@STEP may be what `begun` was resolved from: its checkpoint, or the run that has it."""
    path = Path(begun.checkpoint).resolve()
    is_step = step is None or path.name == checkpoint.checkpoint_path(path.parent, step).name
    return path.is_relative_to(Path(run).resolve()) and is_step


def _open(run: str, step: int | None, console: Console, in_recipe: bool) -> CheckpointHandle:
    path = Path(run)
    folder, is_checkpoint = locate(path)
    if step is not None and not is_checkpoint and folder.is_dir():
        path = checkpoint.checkpoint_path(folder, step)
        if not path.is_dir():
            steps = ", ".join(str(int(saved.name[5:])) for saved in reversed(checkpoint.saved_checkpoints(folder)))
            raise CheckpointError(
                f"{run}: no checkpoint of step {step}, it has {steps or 'none'}: name one of them as RUN@STEP, and "
                "keep more of them by checkpoint.keep_last"
            )
    try:
        handle = open_model(path, console)
    except CheckpointError as error:
        if not in_recipe:
            raise
        raise CheckpointError(f"start.checkpoint of the recipe: {error}; or name another by {OPTION}") from error
    if handle.native is None or not handle.has_training_recipe:
        raise CheckpointError(
            f"{path}: not a checkpoint of a training run, so there is no run to branch from: start "
            "from its weights by --model"
        )
    if step not in (None, handle.step):
        raise CheckpointError(f"{path}: holds step {handle.step}, not {step}: leave the step out")
    return handle


def check(branch: Branch, recipe: TrainingRecipe) -> None:
    """Raise RecipeError if a run of `recipe` takes no step after the checkpoint."""
    handle = branch.handle
    if handle is not None and recipe.train.steps <= handle.step:
        raise RecipeError(
            f"train.steps ({recipe.train.steps}): counts from the beginning of {handle.path.parents[1]}, and the "
            f"branch begins after step {handle.step}: take more, such as {2 * handle.step}, or an earlier checkpoint "
            f"({OPTION} RUN@STEP)"
        )


def load(handle: CheckpointHandle, weights: ModelWeights, optimizer: Optimizer) -> None:
    """Load the weights and the optimizer state of the checkpoint into a new run.

    Raises:
        CheckpointError: the optimizer is of another kind, or has state that the checkpoint lacks.
    """
    assert handle.native is not None, "checked when it was opened"
    load_weights(weights, handle.weights())
    if optimizer.state():
        load_optimizer_state(
            optimizer, handle.native, weights.experts, f"take the optimizer of that run, or, {WEIGHTS_ONLY}."
        )


def begin(state: TrainState, handle: CheckpointHandle, recipe: TrainingRecipe, same_text: bool) -> str:
    """Set the state of a new run to that of the checkpoint, and return what became of the position in the data.

    Steps, seconds, target tokens and skipped steps go on. Evaluations, best values and metrics since the last record
    begin anew: they may be of other data or settings.

    Args:
        state: the state of the new run.
        handle: the checkpoint.
        recipe: the recipe of the new run.
        same_text: whether the data is that of the checkpoint, by its digest.
    """
    assert handle.native is not None, "checked when it was opened"
    saved = TrainState()
    saved.restore(handle.native.document("state.json"), torch.device("cpu"), with_metrics=False)
    state.step, state.seconds = saved.step, saved.seconds
    state.targets_seen, state.skipped_steps = saved.targets_seen, saved.skipped_steps
    changed = _first_data_change(differences(handle.recipe, recipe)) or ("" if same_text else "its text")
    rows, rows_before = recipe.rows_per_step, handle.recipe.rows_per_step
    input_tokens = saved.input_tokens(handle.recipe.train.batch_tokens)
    if changed:
        state.branch = BranchPoint(saved.step, input_tokens, -saved.step * rows, is_data_continued=False)
        return f"the data begins anew ({changed} is another)"
    # The first row of the next step, in the order of the data, is the one after the last row of that run.
    row_offset = saved.branch.row_offset + saved.step * (rows_before - rows)
    state.branch = BranchPoint(saved.step, input_tokens, row_offset)
    state.position = saved.position
    return "the data goes on where that run was"


def _first_data_change(changes: Iterable[Difference]) -> str | None:
    """Return the first key that changes which rows a step reads besides the text itself, or None."""
    for key, _, _ in changes:
        is_data = key.startswith(("data.", "tasks")) or key == "train.seed"
        if is_data and not key.startswith(_NAMES_OF_TEXT) and not key.endswith(".unreadable"):
            return key
    return None


def command(verb: str, run: Path, overrides: Sequence[str] = ()) -> str | None:
    """Return the command line of this process with the run to branch from, a new folder, and more overrides.

    None if the process has none, because `verb` was not started from a shell.
    """
    arguments = sys.argv[1:]
    if arguments[:1] != [verb]:
        return None
    replaced = ("--out", "--model", OPTION)
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in replaced:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in replaced)) and argument not in (
            "--resume",
            "--no-resume",
        ):
            kept.append(argument)
    end = kept.index("--") if "--" in kept else len(kept)
    return shell_words(*kept[:end], *overrides, OPTION, run, "--out", _unused(run), *kept[end:])


def _unused(run: Path) -> Path:
    number = 1
    while (path := run.with_name(f"{run.name}-branch{number}")).exists():
        number += 1
    return path
