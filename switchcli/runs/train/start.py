"""Start a run of any verb that trains: resolve its recipe, and open its trainer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from switchcli.checkpoint.run_folder import RunFolder
from switchcli.distributed.rendezvous import prepare_rank
from switchcli.errors import RecipeError
from switchcli.recipe.resolve import Source
from switchcli.runs.devices.mesh_choice import build_context
from switchcli.runs.job.job import Job, resolve_on_main
from switchcli.runs.job.pins import Options, PinFinder
from switchcli.runs.job.run_dir import lock_run_dir
from switchcli.runs.train.distilling import Distillation
from switchcli.runs.train.trainer import Trainer
from switchcli.runs.train.training_task import Finetuning, Pretraining, TrainingTask
from switchcli.terminal.console import Console, main_console
from switchcli.training import memory

TASKS: Mapping[str, type[TrainingTask]] = {task.verb: task for task in (Pretraining, Finetuning, Distillation)}
"""The training task of each verb that trains."""


def resolve_job(verb: str, source: Source, options: Options, out: Path, resume: bool) -> Job:
    """Return the settings of a run in the folder `out`, resolved on rank 0, with its open checkpoints.

    Raises:
        RecipeError, CheckpointError, DataError: as `RunFolder.check_free` and `TrainingTask.resolve_job` say.
    """
    prepare_rank()
    if verb == "distill" and options.model is not None:
        raise RecipeError("model: distill has none: name the checkpoint that learns by student=")
    if verb != "distill" and (options.teacher, options.student, options.baseline) != (None, None, None):
        raise RecipeError(f"teacher, student, baseline: for distill alone, and this is a recipe of {verb}")
    source = options.write(source)

    def resolve() -> Job:
        RunFolder(out, resume).check_free()
        return TASKS[verb].resolve_job(source, PinFinder(out, resume, main_console()))

    return resolve_on_main(source.merge(), resolve)


@contextmanager
def open_trainer(job: Job, out: Path, resume: bool, quiet: bool) -> Iterator[Trainer]:
    """Yield the trainer of the run in `out`, and hold the lock of that folder.

    Lack of memory in this block raises an error that explains it. torch's random numbers go on after it as if nothing
    had been trained.

    Raises:
        SwitchError: as `build_context`, `lock_run_dir` and `Trainer` say.
    """
    recipe = job.recipe
    context = build_context(recipe)
    console = Console(quiet=quiet or not context.is_main)
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices), lock_run_dir(out, resume, recipe, context, console) as folder:
        task = TASKS[recipe.verb](job, folder, context, console)
        with memory.explain_out_of_memory(recipe.model, recipe.optimizer, context.device, task.update, task.teacher):
            yield Trainer(task)
        context.close()
