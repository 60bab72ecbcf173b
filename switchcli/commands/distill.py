"""`switchcli distill`: a student from a teacher, on text or on tasks (section 4.2). No torch until it runs."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands import _exit
from switchcli.commands._options import DryRun, Json, Processes, Quiet, Resume, default_out, split_arguments

app = typer.Typer()


@app.command()
def distill(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE ...]",
            help="What to train on and for how long; absent: as the teacher was.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="What to learn from.", show_default=False)
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|CHECKPOINT",
            help="What learns; absent: the dense model with the teacher's FLOPs a token.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|FIGURE",
            help="The dense model over which the teacher has its gain, for the share of it that is kept.",
            show_default=False,
        ),
    ] = None,
    answers_only: Annotated[
        bool,
        typer.Option(
            "--cache-only", "--answers-only", help="Ask the teacher, keep its answers, and stop (distill.cache)."
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder; runs/RECIPE or runs/distill/TEACHER when absent.")
    ] = None,
    resume: Resume = True,
    processes: Processes = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a dense or smaller student on a teacher's probabilities; the same command goes on after a stop."""
    with _exit.interruptible(ranks=True):
        from switchcli.commands import _job
        from switchcli.runs import distill_job, run_dir, trainer
        from switchcli.runs.distilling import Distillation, fill_teacher_cache

        recipe, overrides = split_arguments(arguments or [])
        if out is None:
            below = Path("runs") / "distill" / run_dir.run_name(Path(teacher or "."))
            out = below if recipe is None else default_out(recipe)
        models = distill_job.Models(teacher, student, baseline)
        job = distill_job.resolve_job(recipe, overrides, models, out, resume, _exit.console())
        if _job.print_dry_run(job.recipe, dry_run, as_json):
            return
        _job.start_ranks(processes, job.recipe, as_json)
        if answers_only:
            _job.finish(fill_teacher_cache(job, quiet), as_json)
            return
        with trainer.open_trainer(job, Distillation, out, resume, quiet) as run:
            result = run.run()
        _job.finish(result, as_json)
