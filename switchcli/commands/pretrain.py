"""`switchcli pretrain`: a recipe into a trained, evaluated, resumable model, on plain text. No torch until it runs."""

from switchcli.commands import exit
from switchcli.commands.arguments import (
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
    with exit.stoppable(ranks=True):
        from switchcli.commands import training
        from switchcli.recipe.schema import PretrainRecipe
        from switchcli.runs import trainer, warm_start
        from switchcli.runs.pretraining import Pretraining

        out = out or default_out(recipe)
        job = warm_start.resolve_job(recipe, overrides or [], model, out, resume, exit.console(), PretrainRecipe)
        if training.described(job.recipe, dry_run, as_json):
            return
        training.start_ranks(processes, job.recipe, as_json)
        with trainer.opened(job, Pretraining, out, resume, quiet) as run:
            result = run.run()
        training.end(result, as_json)
