"""`switchcli distill`: train a student on a teacher's probabilities (section 4.2). Imports torch only when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands import _exit, _training
from switchcli.commands._options import (
    A_CHECKPOINT,
    DryRun,
    Json,
    Processes,
    Quiet,
    Resume,
    default_out,
    split_arguments,
)

app = typer.Typer()


@app.command()
def distill(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE ...]",
            help="What to train on and for how long. Default: what the teacher was trained on.",
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help=f"The model to learn from. {A_CHECKPOINT}")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|CHECKPOINT",
            help="The model that learns. Default: the dense model with the teacher's FLOPs per token.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|FIGURE",
            help="A dense model, or its metric, to report how much of the teacher's gain over it the student keeps.",
        ),
    ] = None,
    cache_only: Annotated[
        bool,
        typer.Option(
            "--cache-only", "--answers-only", help="Save the teacher's probabilities to distill.cache, and stop."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: runs/RECIPE, or runs/distill/TEACHER without one.")
    ] = None,
    resume: Resume = True,
    processes: Processes = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a dense or smaller student on a teacher's probabilities; the same command goes on after a stop."""
    with _exit.interruptible(ranks=True):
        from switchcli.runs import distill_job, run_dir, trainer
        from switchcli.runs.distilling import Distillation, fill_teacher_cache

        recipe, overrides = split_arguments(arguments or [])
        if out is None and recipe is not None:
            out = default_out(recipe)
        elif out is None:
            out = Path("runs") / "distill" / run_dir.run_name(Path(teacher or "."))
        models = distill_job.Models(teacher, student, baseline)
        job = distill_job.resolve_job(recipe, overrides, models, out, resume, _exit.console())
        if dry_run:
            _training.print_dry_run(job.recipe, as_json)
            return
        _training.start_ranks(processes, job.recipe, as_json)
        if cache_only:
            _training.finish(fill_teacher_cache(job, quiet), as_json)
            return
        with trainer.open_trainer(job, Distillation, out, resume, quiet) as run:
            result = run.run()
        _training.finish(result, as_json)
