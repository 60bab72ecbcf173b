"""The checkpoints that a recipe names: each name means one checkpoint at one step, as long as the run lasts.

The name of a run means its newest checkpoint, and a run that is training saves newer ones. So a run keeps what it began
with: the recipe.yaml in its folder names the checkpoints by their steps, and the run that is resumed takes these.

`Options` are the options that name models: each is another way to write a key of the recipe.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec
from switchcli.recipe import resolve, yaml_nodes
from switchcli.recipe.resolve import Source
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.inputs.loading import CheckpointHandle, locate, open_model
from switchcli.runs.inputs.trained_recipe import read_recipe, trained_recipe
from switchcli.system.user_files import read_regular
from switchcli.terminal.console import Console

START, TEACHER, STUDENT, BASELINE = "start.checkpoint", "distill.teacher", "student.path", "distill.baseline"
OPTIONS: Mapping[str, str] = {START: "--model", TEACHER: "--teacher", STUDENT: "--student", BASELINE: "--baseline"}
"""The option that names the checkpoint, by key."""
BRANCH_FROM = "--branch-from"
WEIGHTS_ONLY = "to take only its weights, start from it by --model and start.keep=weights"
"""What to do instead of a branch."""


class Pin(NamedTuple):
    """The checkpoint that a key of a recipe names."""

    path: str
    model: ModelSpec
    """The shape of its weights."""
    handle: CheckpointHandle | None
    """The open checkpoint. None for a run that has begun, which needs it no more."""
    keep: str | None = None
    """For `start`: the value of `start.keep` where the recipe leaves it out."""


class PinFinder:
    """Finds the checkpoints that the recipe of a run in the folder `out` names."""

    def __init__(self, out: Path, resume: bool, console: Console) -> None:
        """`resume` says whether a run in `out` goes on. `console` gets warnings about checkpoints."""
        self._out, self._console = out, console
        folder = RunFolder(out)
        self._recorded: TrainingRecipe | None = None
        """The recipe of the run in `out`."""
        if resume and folder.recipe.is_file():
            with suppress(OSError, RecipeError, CheckpointError):  # of another program: the folder is refused later
                self._recorded = read_recipe(read_regular(folder.recipe, yaml_nodes.MAX_BYTES), folder.recipe)
        self.begun = self._recorded if checkpoint.saved_steps(folder.checkpoints) else None
        """The recipe of the run in `out`, if it has saved a checkpoint."""

    def start(self, tree: Node, verb: str) -> Pin | None:
        """Return the checkpoint that `start` names, or None for initial weights.

        With `keep: run`, it is a run of the same verb, and may be named as RUN@STEP.

        Raises:
            RecipeError: it lies in the folder of the new run, or is of another verb.
            CheckpointError: there is no such checkpoint.
        """
        named = resolve.stated_path(tree, START)
        if not isinstance(named, str):
            return None
        if tree.stated("start.keep") != "run":
            return self.find(START, named)
        path = _step_path(named)
        pin = self._recorded_pin(START, path) or _pin(self._open(f"{START} ({BRANCH_FROM})", path))
        if pin.handle is None:
            return pin
        trained = trained_recipe(pin.handle)
        if trained is None:
            raise CheckpointError(
                f"{START} ({BRANCH_FROM}): {named}: not a checkpoint of a training run, so there is no run to branch "
                "from: start from its weights by --model"
            )
        if trained.verb != verb:
            raise RecipeError(
                f"{BRANCH_FROM} {named}: a run of {trained.verb}, which `switchcli {trained.verb}` can branch; "
                f"{WEIGHTS_ONLY}"
            )
        return pin

    def find(self, key: str, named: str) -> Pin:
        """Return the checkpoint that `named`, the value of `key`, means.

        Raises:
            RecipeError: it lies in the folder of the run.
            CheckpointError: there is no such checkpoint, or it is needed and gone.
        """
        return self._recorded_pin(key, Path(named)) or _pin(self.open(key, named))

    def _recorded_pin(self, key: str, named: Path) -> Pin | None:
        """Return the checkpoint that the run in `out` began with, if `named` may mean it; else None.

        That is the checkpoint itself, or a folder that holds it.
        """
        if self._recorded is None:
            return None
        tree = resolve.layer(self._recorded.model_dump(mode="json"), str(self._out))
        path = tree.stated(key)
        if not isinstance(path, str) or not Path(path).resolve().is_relative_to(named.resolve()):
            return None
        if self.begun is not None and key != TEACHER:
            return Pin(path, self.begun.model, None, tree.stated("start.keep"))
        if not Path(path).exists():
            raise CheckpointError(
                f"{RunFolder(self._out).recipe}: this run began with {key} {path}, which is gone (a run keeps its last "
                "checkpoint.keep_last): bring it back, or --no-resume to start over"
            )
        return _pin(self.open(key, path))

    def open(self, key: str, path: str) -> CheckpointHandle:
        """Open a checkpoint outside of the folder of the run. `key` names it in errors."""
        name = f"{key} ({OPTIONS[key]})"
        handle = self._open(name, Path(path))
        if handle.path != Path(path) and (trained := trained_recipe(handle)) is not None:
            steps = trained.train.steps
            if handle.step < steps:
                self._console.warning(
                    f"{name} {path}: this run has not ended: its step {handle.step:,} of {steps:,} is taken"
                )
        return handle

    def _open(self, name: str, path: Path) -> CheckpointHandle:
        """Open a checkpoint. Raises RecipeError if it lies in the run's own folder, where the run may remove it."""
        try:
            handle = open_model(path, self._console)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if handle.path.resolve().is_relative_to(self._out.resolve()):
            raise RecipeError(
                f"{name} {handle.path}: lies within the run's own folder {self._out}: give another folder by --out"
            )
        return handle


def _pin(handle: CheckpointHandle) -> Pin:
    # A folder of transformers holds no optimizer state.
    keep = "weights" if handle.native is None else "optimizer"
    return Pin(str(handle.path), handle.spec, handle, keep)


def _step_path(name: str) -> Path:
    """Return the folder that RUN[@STEP] names, which need not exist. A path that exists as a whole has no step."""
    run, at, step = name.rpartition("@")
    if at and run and step.isascii() and step.isdecimal() and not Path(name).exists():
        folder = locate(Path(run))[0] if Path(run).is_dir() else Path(run, "checkpoints")
        return checkpoint.checkpoint_path(folder, int(step))
    return Path(name)


class Options(NamedTuple):
    """The models that a command line names by options. All but the size of a student are checkpoints."""

    model: str | None = None
    branch_from: str | None = None
    """RUN or RUN@STEP."""
    teacher: str | None = None
    student: str | None = None
    """A checkpoint or a size."""
    baseline: str | None = None
    """A checkpoint or a number."""

    def write(self, source: Source) -> Source:
        """Return the recipe with the keys of these options, which win over those in files.

        Raises:
            RecipeError: an option contradicts another one, a key of the command line, or the recipe.
        """
        keys = dict(self._keys(source.merge()))
        commands = Source((resolve.layer({}, "the command line"),), source.overrides).merge()
        for key, option in ((START, "--model" if self.model else BRANCH_FROM), (TEACHER, "--teacher")):
            if key in keys and commands.stated(key) is not None:
                raise RecipeError(f"{key}: there is {option} too: leave one out")
        if STUDENT in keys and (kind := commands.stated("student.kind")) not in (None, "checkpoint"):
            raise RecipeError(
                f"student.kind ({kind}): --student {self.student} is a checkpoint to start from: leave one out"
            )
        return source.overridden(*(resolve.override(key, value) for key, value in keys.items()))

    def _keys(self, tree: Node) -> Iterator[tuple[str, Any]]:
        """Yield the dotted keys that the options set, with their values."""
        if self.model is not None and self.branch_from is not None:
            raise RecipeError(f"--model and {BRANCH_FROM}: both name the checkpoint to start from: leave one out")
        if self.model is not None and tree.stated("start.keep") == "run":
            raise RecipeError(
                f"--model ({self.model}): start.keep is run: name the run by {BRANCH_FROM}, or take start.keep=weights"
            )
        if self.model is not None or self.branch_from is not None:
            yield START, self.model or self.branch_from
        if self.branch_from is not None:
            yield "start.keep", "run"
        if self.teacher is not None:
            yield TEACHER, self.teacher
        if self.student in SIZES:
            if tree.stated(STUDENT) is not None:
                raise RecipeError(
                    f"--student {self.student}: a size, and the recipe's {STUDENT} is a checkpoint: leave one out"
                )
            yield "model.size", self.student
        elif self.student is not None:
            yield "student.kind", "checkpoint"
            yield STUDENT, self.student
        if self.baseline is not None:
            yield BASELINE, _parse_baseline(self.baseline)


def _parse_baseline(baseline: str) -> float | str:
    """Return the number that `--baseline` gives, or the path of a checkpoint."""
    try:
        value = float(baseline)
    except ValueError:
        return baseline
    if not math.isfinite(value):
        raise RecipeError(f"--baseline ({baseline}): must be a checkpoint, or a finite number")
    return value
