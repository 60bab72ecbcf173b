"""Pin the checkpoints that a recipe names: each name means one checkpoint at one step, as long as the run lasts.

The name of a run means its newest checkpoint, and a run that is training saves newer ones. So a run keeps what it began
with: the recipe in its checkpoint records it, and before the first save the recipe.yaml in its folder. A branch keeps
what the run keeps that it continues.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import ModelSpec
from switchcli.recipe import resolve
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.recipe.yaml_nodes import Node
from switchcli.report.console import Console
from switchcli.runs.inputs.loading import CheckpointHandle, locate, open_model, saved_recipe
from switchcli.system.startup import LAUNCHER

START, TEACHER, STUDENT, BASELINE = "start.checkpoint", "distill.teacher", "student.path", "distill.baseline"
OPTIONS: Mapping[str, str] = {START: "--model", TEACHER: "--teacher", STUDENT: "--student", BASELINE: "--baseline"}
"""The option that names the checkpoint, by key."""
BRANCH_FROM = "--branch-from"
WEIGHTS_ONLY = "to take only its weights, start from it by --model and start.keep=weights"
"""What to do instead of a branch."""
_HANDED_OVER = "SWITCHCLI_PINS"
"""The environment variable in which ranks of `--processes` find the checkpoints of the job, by key, as JSON."""


class Pin(NamedTuple):
    """The checkpoint that a key of a recipe names."""

    path: str
    model: ModelSpec
    """The shape of its weights."""
    handle: CheckpointHandle | None
    """The open checkpoint. None for a run that has begun, which needs it no more."""
    sha256: str | None = None
    """The digest of its weights and optimizer state, for `start`."""


class _Record(NamedTuple):
    """A recipe that records which checkpoints a run began with."""

    where: Path
    tree: Node
    recipe: TrainingRecipe | None
    """The value of `tree`, if the run has saved a checkpoint."""


class PinFinder:
    """Finds the checkpoints that the recipe of a run in the folder `out` names."""

    def __init__(self, out: Path, resume: bool, console: Console) -> None:
        """`resume` says whether a run in `out` goes on. `console` gets warnings about damaged checkpoints."""
        self._out, self._console = out, console
        self._given = handed_over()
        self.begun = run_recipe(out) if resume else None
        """The recipe of the run in `out`, if it has saved a checkpoint."""
        self._records: list[_Record] = []
        if self.begun is not None:
            self._add_record(out, self.begun)
        elif resume and (tree := _recorded(out)) is not None:
            self._records.append(_Record(RunFolder(out).recipe, tree, None))

    def _add_record(self, where: Path, recipe: TrainingRecipe) -> None:
        self._records.append(_Record(where, resolve.layer(recipe.model_dump(mode="json"), str(where)), recipe))

    def start(self, tree: Node, verb: str) -> Pin | None:
        """Return the checkpoint that `start` names, or None for initial weights.

        With `keep: run`, it is a run of the same verb, and may be named as RUN@STEP.

        Raises:
            RecipeError: it lies in the folder of the new run, or is of another verb.
            CheckpointError: there is no such checkpoint, or `start.sha256` is that of another one.
        """
        named = resolve.stated_path(tree, START)
        if not isinstance(named, str):
            return None
        named = self.given(START, named)
        is_branch = tree.stated("start.keep") == "run"
        pin = self._parent(named, verb) if is_branch else self.find(START, named)
        if pin.handle is None:  # a changed digest is refused as any changed key of a run that has begun
            return pin
        sha256, stated = _digest(pin.handle), tree.stated("start.sha256")
        if stated not in (None, sha256):
            raise CheckpointError(
                f"{pin.path}: not the checkpoint that start.sha256 of the recipe names: it was saved again since, or "
                "is of another layout: take start.sha256=null to begin from what it holds now"
            )
        return pin._replace(sha256=sha256)

    def _parent(self, named: str, verb: str) -> Pin:
        """Return the checkpoint of the run that a branch continues. From now on, what that run recorded counts too."""
        run, step = split_step(named)
        pin = self._recorded_pin(START, run, step, is_needed=False, keep="run")
        if pin is None:
            handle = self._open_parent(run, step)
            if handle.recipe.verb != verb:
                raise RecipeError(
                    f"{BRANCH_FROM} {named}: a run of {handle.recipe.verb}, which `switchcli {handle.recipe.verb}` can "
                    f"branch; {WEIGHTS_ONLY}"
                )
            pin = _pin(handle)
        if pin.handle is not None:
            self._add_record(pin.handle.path, pin.handle.recipe)
        return pin

    def find(self, key: str, named: str, is_needed: bool = False) -> Pin:
        """Return the checkpoint that `named`, the value of `key`, means.

        `is_needed` says that the checkpoint is needed although the run has begun.

        Raises:
            RecipeError: it lies in the folder of the run.
            CheckpointError: there is no such checkpoint, or it is needed and gone.
        """
        named = self.given(key, named)
        return self._recorded_pin(key, named, None, is_needed) or _pin(self.open(key, named))

    def given(self, key: str, named: str) -> str:
        """Return the checkpoint that the launcher of this rank has found for `named`, or `named` itself."""
        return self._given.get(key, named)

    def _recorded_pin(
        self, key: str, named: str, step: int | None, is_needed: bool, keep: str | None = None
    ) -> Pin | None:
        """Return what a record says that the run began with, if that is within `named`.

        With `keep`, only runs count whose `start.keep` is that.
        """
        for record in self._records:
            if keep is not None and record.tree.stated("start.keep") != keep:
                continue
            path = record.tree.stated(key)
            if not isinstance(path, str) or not _is_within(path, named, step):
                continue
            if record.recipe is not None and not is_needed:
                sha256 = record.tree.stated("start.sha256") if key == START else None
                return Pin(path, record.recipe.model, None, sha256)
            if Path(path).exists():
                handle = self.open(key, path)
                if step is None:
                    self._warn_of_newer(key, named, handle)
                return _pin(handle)
            if record.recipe is not None:
                raise CheckpointError(
                    f"{record.where}: this run began with {key} {path}, which is gone (a run keeps its last "
                    "checkpoint.keep_last): bring it back, or --no-resume to start over"
                )
            self._console.warning(
                f"{record.where}: its {key}, {path}, is gone: the run starts from what {named} has now"
            )
        return None

    def _warn_of_newer(self, key: str, named: str, kept: CheckpointHandle) -> None:
        """Print a warning if the run that `named` means has gone on since this run began with the checkpoint `kept`."""
        folder, is_checkpoint = locate(Path(named))
        newest = kept.step if is_checkpoint else max(checkpoint.saved_steps(folder), default=0)
        if newest > kept.step:
            self._console.warning(
                f"{key} ({OPTIONS[key]}) {named}: has step {newest:,} now, and this run keeps step {kept.step:,}, with "
                "which it began: give another --out, or --no-resume, to take the newer one"
            )

    def open(self, key: str, path: str) -> CheckpointHandle:
        """Open a checkpoint outside of the folder of the run. `key` names it in errors."""
        name = f"{key} ({OPTIONS[key]})"
        handle = self._open(name, Path(path))
        self._check_outside(name, handle)
        is_run, steps = handle.path != Path(path), handle.recipe.train.steps
        if is_run and handle.has_training_recipe and handle.step < steps:
            self._console.warning(
                f"{name} {path}: this run has not ended: its step {handle.step:,} of {steps:,} is taken"
            )
        return handle

    def _open(self, name: str, path: Path) -> CheckpointHandle:
        try:
            return open_model(path, self._console)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def _check_outside(self, name: str, handle: CheckpointHandle) -> None:
        """Raise RecipeError if the checkpoint lies in the run's own folder, where the run may remove it."""
        if handle.path.resolve().is_relative_to(self._out.resolve()):
            raise RecipeError(
                f"{name} {handle.path}: lies within the run's own folder {self._out}: give another folder by --out"
            )

    def _open_parent(self, run: str, step: int | None) -> CheckpointHandle:
        """Open the checkpoint of the run that a new run continues as a branch."""
        path = Path(run)
        folder, is_checkpoint = locate(path)
        name = f"{START} ({BRANCH_FROM})"
        if step is not None and not is_checkpoint and folder.is_dir():
            path = checkpoint.checkpoint_path(folder, step)
            if not path.is_dir():
                steps = ", ".join(map(str, reversed(checkpoint.saved_steps(folder))))
                raise CheckpointError(
                    f"{name}: {run}: no checkpoint of step {step}, it has {steps or 'none'}: name one of them as "
                    "RUN@STEP, and keep others by checkpoint.keep_steps"
                )
        handle = self._open(name, path)
        if not handle.has_training_recipe:
            raise CheckpointError(
                f"{name}: {path}: not a checkpoint of a training run, so there is no run to branch from: start from "
                "its weights by --model"
            )
        if step not in (None, handle.step):
            raise CheckpointError(f"{name}: {path}: holds step {handle.step}, not {step}: leave the step out")
        self._check_outside(name, handle)
        return handle


@contextmanager
def hand_over(checkpoints: Mapping[str, str]) -> Iterator[None]:
    """Let the ranks that this process starts in this context take these checkpoints, and look for no newer ones."""
    os.environ[_HANDED_OVER] = json.dumps(dict(checkpoints))
    try:
        yield
    finally:
        del os.environ[_HANDED_OVER]


def handed_over() -> Mapping[str, str]:
    """Return the paths of the checkpoints that the launcher of this rank has found, by key."""
    pins: Mapping[str, str] = json.loads(os.environ.get(_HANDED_OVER, "{}")) if LAUNCHER in os.environ else {}
    return pins


def _pin(handle: CheckpointHandle) -> Pin:
    return Pin(str(handle.path), handle.recipe.model, handle)


def _digest(handle: CheckpointHandle) -> str | None:
    """Return the digest of the weights and the optimizer state, or None for a checkpoint of another layout."""
    if handle.native is None:
        return None
    entries = [entry for entry in handle.native.manifest.files if entry.name.endswith(".safetensors")]
    return hashlib.sha256(repr([(entry.name, entry.sha256) for entry in entries]).encode()).hexdigest()


def split_step(name: str) -> tuple[str, int | None]:
    """Return the path and the step of RUN[@STEP]. A path that exists as a whole has no step."""
    path, at, step = name.rpartition("@")
    if at and path and step.isascii() and step.isdecimal() and not Path(name).exists():
        return path, int(step)
    return name, None


def _is_within(path: str, named: str, step: int | None) -> bool:
    """Return whether `named` may mean the checkpoint `path`: that one, or a folder that holds it."""
    resolved = Path(path).resolve()
    is_step = step is None or resolved.name == checkpoint.checkpoint_path(resolved.parent, step).name
    return resolved.is_relative_to(Path(named).resolve()) and is_step


def run_recipe(out: Path) -> TrainingRecipe | None:
    """Return the recipe of the run in `out`, or None if it has saved no checkpoint."""
    latest = checkpoint.newest(out / "checkpoints", warn=lambda damage: None)
    return None if latest is None else saved_recipe(latest)


def _recorded(out: Path) -> Node | None:
    """Return recipe.yaml of a run in `out` that has saved nothing yet; None if there is none that can be read."""
    recipe = RunFolder(out).recipe
    if not recipe.is_file():
        return None
    try:
        return resolve.load(str(recipe))
    except RecipeError:  # of another program, or damaged
        return None
