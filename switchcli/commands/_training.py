"""Functions that the verbs share which train or evaluate: a common command, the dry run, the ranks, the result."""

import os
from typing import TYPE_CHECKING, NoReturn

import typer

from switchcli.commands import _exit
from switchcli.commands._options import (
    BranchFrom,
    DryRun,
    Json,
    Model,
    Out,
    Overrides,
    Processes,
    Quiet,
    Recipe,
    Resume,
    default_out,
)
from switchcli.commands._result import Line, finish
from switchcli.distributed.rendezvous import is_rank, join_srun
from switchcli.errors import RecipeError
from switchcli.terminal.console import Console
from switchcli.terminal.table import Table
from switchcli.terminal.units import number

if TYPE_CHECKING:
    from switchcli.recipe.schema import EvalRecipe
    from switchcli.recipe.training_recipe import TrainingRecipe
    from switchcli.runs.job.job import Job


def training_app(verb: str, help: str, epilog: str) -> typer.Typer:
    """Return the command of a verb that trains a model by a recipe, from scratch or from a checkpoint.

    `help` and `epilog` are texts of `--help`.
    """
    app = typer.Typer()

    @app.command(verb, help=help, epilog=epilog)
    @_exit.interruptible()
    def train(
        recipe: Recipe,
        overrides: Overrides = None,
        model: Model = None,
        out: Out = None,
        branch_from: BranchFrom = None,
        resume: Resume = True,
        processes: Processes = 1,
        dry_run: DryRun = False,
        as_json: Json = False,
        quiet: Quiet = False,
    ) -> None:
        from switchcli import api

        run = api.read_recipe(recipe, overrides or (), verb)
        out = out or default_out(recipe)
        if dry_run or starts_ranks(processes):
            job = api.resolve_job(run, out, resume, model=model, branch_from=branch_from)
            if dry_run:
                print_dry_run(job, processes, as_json)
                return
            start_ranks(processes, job.recipe, quiet)
        result = api.train(run, out, model=model, branch_from=branch_from, resume=resume, verbose=not quiet)
        finish(result.record, as_json)

    return app


def print_dry_run(job: "Job", processes: int, as_json: bool) -> None:
    """Open what the recipe names, and print its size, FLOPs, tokens and epochs; for scripts with every key."""
    from switchcli.runs.devices.costs import describe
    from switchcli.runs.train.start import TASKS

    if processes > 1:
        job.recipe.check_ranks(processes)
    about = {"epochs": TASKS[job.recipe.verb].open_inputs(job), **describe(job.recipe)}
    rows = [(name.replace("_", " "), number(value)) for name, value in about.items() if value is not None]
    result = {**about, "recipe": job.recipe.model_dump(mode="json")}
    finish(
        result,
        as_json,
        [Table(("", ""), rows), Line("nothing was trained; --json also prints every key of the recipe")],
    )


def starts_ranks(processes: int) -> bool:
    """Return whether this process starts ranks that do the work."""
    if processes == 1:
        return False
    join_srun(os.environ)  # a task of srun is a rank
    if is_rank() and os.environ["WORLD_SIZE"] != str(processes):
        raise RecipeError(
            f"--processes ({processes}): a launcher has started this command on {os.environ['WORLD_SIZE']} ranks: "
            "leave it out"
        )
    return not is_rank()


def start_ranks(processes: int, recipe: "TrainingRecipe | EvalRecipe", quiet: bool) -> NoReturn:
    """Run this command as several ranks, and exit with their exit code."""
    from switchcli.runs.job.job import launch_ranks

    _exit.exit_with(launch_ranks(processes, recipe, Console(quiet=quiet)))
