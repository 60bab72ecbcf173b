"""The folder of a run: its default name, its lock, its recipe, and whether a run in it can be resumed."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.documents import RECIPE
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.config import CHANGEABLE_MODEL_KEYS
from switchcli.recipe.resolve import differences
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.inputs.trained_recipe import read_recipe
from switchcli.runs.job.pins import BRANCH_FROM
from switchcli.system.lock import lock
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shell_words

_SAFE_KEYS = (
    "description",
    "train.steps",
    "train.device",
    "train.activation_checkpointing",
    "train.nonfinite",
    "log.",
    "eval.every_steps",
    "checkpoint.",
    "distill.baseline",
    "parallel.",
)
"""Keys, or prefixes of keys, that may change when a run is resumed.

They affect neither the training so far nor the data of a metric. The best checkpoint compares metrics of all starts.
"""
PLACE_OF_DATA: Final = re.compile(r"data\.folder$|tasks\.\d+\.(train|validation|test)(\.|$)")
"""Keys that say where examples are. They may change too: the checkpoint's digests tell whether they are the same. The
paths of text may not: they say what is held out."""

_FIXED_IN_BRANCHES = ("verb", "start", "student", "data.tokenizer", "optimizer.kind", "update")
"""Keys, or prefixes of keys, besides the shape of the model, that must not change when a run is branched."""


def run_name(checkpoint: Path) -> Path:
    """Return the path of a run below runs/, or the name of its folder elsewhere; with `-step-N` for one checkpoint."""
    path, runs = checkpoint.resolve(), Path("runs").resolve()
    run, suffix = path, ""
    if path.parent.name == "checkpoints":  # RUN/checkpoints/step-N
        run, suffix = path.parents[1], f"-{path.name}"
    name = run.relative_to(runs) if run.is_relative_to(runs) else Path(run.name or "model")
    return name.with_name(f"{name.name}{suffix}")


@contextmanager
def lock_run_dir(
    out: Path, resume: bool, recipe: TrainingRecipe, context: DistributedContext, console: Console
) -> Iterator[RunFolder]:
    """Lock the run's folder, and check that its run can be resumed. Nothing is written into it. Collective.

    The `console` is told of damaged checkpoints.

    Raises:
        CheckpointError: another run has locked the folder, it cannot be written, or not all ranks see it.
        RecipeError: the folder holds a run of another recipe.
    """
    folder = RunFolder(out, resume)

    def lock_and_check() -> checkpoint.Checkpoint | None:
        locks.enter_context(lock(out))
        if not folder.is_to_archive():
            folder.check_links()
        if not resume:
            return None
        checkpoint.recover(folder.checkpoints)  # a kill may have left the only checkpoint under another name
        latest = checkpoint.newest(folder.checkpoints, console.warning)
        if latest is not None:
            # The recipe in the checkpoint, because a user may have edited that of the folder.
            _check_resumable(latest, recipe, out)
        return latest

    with ExitStack() as locks:
        folder.newest = context.main_only(lock_and_check)
        step = context.from_main(-1 if folder.newest is None else folder.newest.step)

        def open_newest() -> checkpoint.Checkpoint | None:
            _check_shared(out)
            if step < 0 or folder.newest is not None:  # the main rank has verified the checkpoint
                return folder.newest
            return checkpoint.Checkpoint.open(checkpoint.checkpoint_path(folder.checkpoints, step), verify=False)

        folder.newest = context.on_all_ranks(open_newest)
        yield folder


def _check_shared(out: Path) -> None:
    """Raise CheckpointError on a rank that does not see the folder that the main rank made."""
    if not out.is_dir():
        raise CheckpointError(
            f"{out}: not there, though the main rank has made it: every rank writes its share of a checkpoint, so give "
            "a folder by --out that all machines share"
        )


def _check_resumable(latest: checkpoint.Checkpoint, recipe: TrainingRecipe, out: Path) -> None:
    """Raise RecipeError if the recipe changes a key of the saved one that must not change when a run is resumed.

    `latest` is the newest checkpoint in the folder `out`.
    """
    saved = read_recipe(latest.document(RECIPE), latest.path / RECIPE)
    changed = [
        difference
        for difference in differences(saved, recipe)
        # A stream may skip rows that it could not read before. Preparation reads all text before the first step.
        if not difference.key.startswith(_SAFE_KEYS)
        and not difference.key.endswith(".unreadable")
        and not PLACE_OF_DATA.match(difference.key)
    ]
    changed.sort(key=lambda difference: difference.key == "model.vocab_size")  # it may follow from the tokenizer
    if changed:
        key, old, new = changed[0]
        if saved.parent is not None and recipe.parent is None:
            raise RecipeError(
                f"{out} holds a run that was branched from {saved.parent.checkpoint}: take "
                f"{BRANCH_FROM} {saved.parent.checkpoint} to resume it, or give another folder by --out"
            )
        if recipe.parent is not None and (saved.parent is None or saved.parent.checkpoint != recipe.parent.checkpoint):
            raise RecipeError(f"{out} holds another run: give a branch a folder of its own by --out")
        more = [other.key for other in changed[1:]]
        others = f" (also changed: {', '.join(more[:3])}{', ...' if len(more) > 3 else ''})" if more else ""
        is_fixed = any(
            key.startswith(_FIXED_IN_BRANCHES)
            or (key.startswith("model.") and key.split(".")[1] not in CHANGEABLE_MODEL_KEYS)
            for key, _, _ in changed
        )
        hint = ""
        if not is_fixed:
            take = "in place of --model or start.checkpoint take" if recipe.start is not None else "add"
            # A branch must have steps left.
            steps = f" train.steps={2 * latest.step}" if latest.step >= recipe.train.steps else ""
            hint = f"; to continue it as a new run, {take} {BRANCH_FROM} {shell_words(out)} --out NEW{steps}"
        again = "leave it out" if old is None else f"set it back to {old}"
        raise RecipeError(
            f"{out} holds a run whose {key} is {old}, and the recipe says {new}{others}: {again}, give "
            "another folder by --out, or --no-resume to archive that run and start over"
            f"{hint}"
        )
