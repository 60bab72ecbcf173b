"""`switchcli pretrain`: a recipe into a trained, evaluated, resumable model, on plain text. No torch until it runs."""

import typer

from switchcli.commands import _exit
from switchcli.commands._options import (
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

app = typer.Typer()


@app.command()
def pretrain(
    recipe: Recipe,
    overrides: Overrides = None,
    model: Model = None,
    out: Out = None,
    resume: Resume = True,
    processes: Processes = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train by span corruption, from scratch or from a --model; the same command goes on after a stop."""
    with _exit.interruptible(ranks=True):
        from switchcli.commands import _job
        from switchcli.recipe.schema import PretrainRecipe
        from switchcli.runs import trainer, warm_start
        from switchcli.runs.pretraining import Pretraining

        out = out or default_out(recipe)
        job = warm_start.resolve_job(recipe, overrides or [], model, out, resume, _exit.console(), PretrainRecipe)
        if _job.print_dry_run(job.recipe, dry_run, as_json):
            return
        _job.start_ranks(processes, job.recipe, as_json)
        with trainer.open_trainer(job, Pretraining, out, resume, quiet) as run:
            result = run.run()
        _job.finish(result, as_json)
