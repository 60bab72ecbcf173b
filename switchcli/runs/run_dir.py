"""The folder of a run: its name, its lock, and who may use it; ranks to start; hardware and versions."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from switchcli import __version__
from switchcli.checkpoint import checkpoint
from switchcli.checkpoint.lock import lock
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.launch import SAVING_SECONDS, Exit, is_rank, launch, saving_seconds
from switchcli.distributed.mesh import ALONE, check_world
from switchcli.errors import CheckpointError, RecipeError
from switchcli.recipe.resolve import differences, dump
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.report.safe_text import shell_words
from switchcli.runs.loading import saved_recipe
from switchcli.spec import Spec

RESUME_SAFE_KEYS = (
    "description",
    "train.steps",
    "train.device",
    "train.activation_checkpointing",
    "train.nonfinite.",
    "train.workers",
    "train.batches_ahead",
    "log.",
    "eval.every_steps",
    "scoring.draws",
    "checkpoint.",
    "distill.baseline",
    "distill.cache.folder",
    "parallel.",
)
"""Keys that may change between two starts of one run: they do not touch what was trained so far, nor what a figure is
measured on. The best checkpoint compares figures of all starts."""


def launch_ranks(processes: int, recipe: TrainingRecipe | EvalRecipe, console: Console) -> Exit | None:
    """Start this very command as `processes` ranks and say how they ended; None when this process does the work.

    Raises:
        RecipeError: more ranks than CUDA devices, or not the ranks that the recipe is for.
        DistributedError: as `launch` says.
    """
    if is_rank():
        return None
    if processes == 1:
        return None
    parallel, device = (
        (recipe.parallel, recipe.train.device) if isinstance(recipe, TrainingRecipe) else (ALONE, recipe.device)
    )
    check_world(parallel, processes)
    if device != "cpu" and torch.cuda.is_available() and processes > torch.cuda.device_count():
        devices = torch.cuda.device_count()
        raise RecipeError(
            f"--processes ({processes}) must be at most the {devices} CUDA devices of this machine: try {devices}, or "
            "train.device=cpu"
        )
    if (seconds := saving_seconds()) < SAVING_SECONDS:
        console.message(
            f"note: with torch {torch.__version__} the ranks have {seconds} s to save after a signal, then they are "
            f"killed; torch 2.13 or newer gives them {SAVING_SECONDS} s"
        )
    return launch(processes, sys.argv[1:])


def run_name(checkpoint: Path) -> Path:
    """RUN, by the run's place below runs/; RUN-step-N for one checkpoint of it."""
    path, runs = checkpoint.resolve(), Path("runs").resolve()
    run, name = (path.parents[1], f"-{path.name}") if path.parent.name == "checkpoints" else (path, "")
    place = run.relative_to(runs) if run.is_relative_to(runs) else Path(run.name or "model")
    return place.with_name(f"{place.name}{name}")


def program_name() -> str:
    """How to call this program again: by its name where the PATH finds it, else by its path."""
    script = Path(sys.executable).with_name("switchcli")
    found = shutil.which("switchcli")
    if found and (not script.exists() or script.samefile(found)):
        return "switchcli"
    if not script.exists():
        return shell_words(sys.executable, "-m", "switchcli")
    return shell_words(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


@contextmanager
def lock_run_dir(
    out: Path, resume: bool, recipe: TrainingRecipe, context: DistributedContext, console: Console
) -> Iterator[RunFolder]:
    """The run's folder, locked, with its recipe written into it; all ranks go on together.

    Raises:
        CheckpointError: another run holds the folder, it cannot be written, or not all ranks see it.
        RecipeError: the folder holds a run of another recipe, or the ranks have different ones.
    """
    folder = RunFolder(out)
    check_ranks_agree(recipe, context)

    def enter() -> None:
        if not resume:
            with lock(out):
                aside = folder.archive()
            if aside:
                console.message(f"the run that was in {out} is now in {aside}")
        held.enter_context(lock(out))
        folder.check_links()
        begun = checkpoint.latest_read_only(folder.checkpoints, warn=lambda damage: None)
        if begun is not None:  # its own recipe: the folder's may have been edited
            _check_same(saved_recipe(begun), recipe, out)
        folder.write_recipe(dump(recipe))
        if begun is None:  # a start that failed, say on its data, binds nobody to its recipe and its vocabulary
            folder.tokenizer.unlink(missing_ok=True)

    with ExitStack() as held:
        context.main_only(enter)
        context.on_all_ranks(lambda: _check_shared(out))
        yield folder


def check_ranks_agree(recipe: Spec, context: DistributedContext) -> None:
    """Raise a RecipeError where ranks have other recipes or versions, before one waits for what another does not do."""
    if not context.all_equal(f"switchcli {__version__}, torch {torch.__version__}\n{recipe.model_dump_json()}"):
        context.main_only(_refuse_other_ranks)


def _check_shared(out: Path) -> None:
    if not out.is_dir():
        raise CheckpointError(
            f"{out}: not there, though the main rank has made it: every rank writes its share of a checkpoint, so give "
            "a folder by --out that all machines share"
        )


def _refuse_other_ranks() -> None:
    raise RecipeError(
        "the ranks do not run the same: each must be given the same recipe and the same KEY=VALUE, with one version of "
        f"switchcli ({__version__} here) and of torch ({torch.__version__})"
    )


def _check_same(before: TrainingRecipe, after: TrainingRecipe, out: Path) -> None:
    found = differences(before, after)
    # A stream may go on past what cannot be read; prepared text has met it before the first step.
    changed = [one for one in found if not one.key.startswith(RESUME_SAFE_KEYS) and not one.key.endswith(".unreadable")]
    if changed:
        key, old, new = changed[0]
        more = f" (and {len(changed) - 1} more keys)" if len(changed) > 1 else ""
        raise RecipeError(
            f"{out} holds a run whose {key} is {old}, and the recipe says {new}{more}: take {old} again, give another "
            "folder by --out, or --no-resume to set that run aside and begin anew"
        )


def machine_info(context: DistributedContext) -> dict[str, Any]:
    """Hardware and versions, for the result."""
    cuda = context.device.type == "cuda"
    return {
        "hardware": {
            # Not platform.processor(), which starts a program to ask.
            "device": torch.cuda.get_device_name(context.device) if cuda else platform.machine(),
            "ranks": context.world,
            "cores": os.cpu_count(),
            "threads_per_rank": torch.get_num_threads(),
        },
        "versions": {
            "switchcli": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
        },
    }
