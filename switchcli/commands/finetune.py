"""`switchcli finetune`: a trained model on text-to-text tasks (section 4.1). No torch until it runs."""

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
def finetune(
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
    """Train a model that is there on text-to-text tasks; the same command goes on after a stop."""
    with _exit.interruptible(ranks=True):
        from switchcli.commands import _job
        from switchcli.recipe.schema import FinetuneRecipe
        from switchcli.runs import trainer, warm_start
        from switchcli.runs.finetuning import Finetuning, check_tasks

        out = out or default_out(recipe)
        job = warm_start.resolve_job(recipe, overrides or [], model, out, resume, _exit.console(), FinetuneRecipe)
        check_tasks(job.recipe)
        if _job.print_dry_run(job.recipe, dry_run, as_json):
            return
        _job.start_ranks(processes, job.recipe, as_json)
        with trainer.open_trainer(job, Finetuning, out, resume, quiet) as run:
            result = run.run()
        _job.finish(result, as_json)
