"""`switchcli distill`: train a student on a teacher's probabilities (section 4.2). Imports torch only when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from switchcli.commands import _exit, _training
from switchcli.commands._options import (
    A_CHECKPOINT,
    BranchFrom,
    DryRun,
    Json,
    Processes,
    Quiet,
    Resume,
    check_folder,
    complete_first_recipe,
    default_out,
    epilog,
    split_arguments,
)
from switchcli.commands._result import finish

app = typer.Typer()


@app.command(
    epilog=epilog(
        "how-to/distill-and-serve",
        "switchcli distill quickstart/distill --baseline runs/quickstart/dense",
        "switchcli distill --teacher runs/quickstart/switch --out runs/student",
    )
)
@_exit.interruptible()
def distill(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE ...]",
            help="What to train on and for how long. Default: what the teacher was trained on.",
            autocompletion=complete_first_recipe,
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help=f"The model to learn from. {A_CHECKPOINT}")
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|CHECKPOINT",
            help="The model that learns. Default: the dense model of the teacher's shape.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT|NUMBER",
            help="A dense model, or its metric, to report how much of the teacher's gain over it the student keeps.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The run's folder. Default: runs/RECIPE, or runs/distill/TEACHER without one.",
            callback=check_folder,
        ),
    ] = None,
    branch_from: BranchFrom = None,
    resume: Resume = True,
    processes: Processes = 1,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a dense or smaller student on a teacher's probabilities; the same command resumes after a stop."""
    from switchcli import api
    from switchcli.runs.job import run_dir

    source, overrides = split_arguments(arguments or [])
    if out is None and source is not None:
        out = default_out(source)
    elif out is None:
        named = (text.removeprefix("distill.teacher=") for text in overrides if text.startswith("distill.teacher="))
        out = Path("runs") / "distill" / run_dir.run_name(Path(teacher or next(named, ".")))
    recipe = api.read_recipe(source, overrides, "distill")
    models: dict[str, Any] = {"teacher": teacher, "student": student, "baseline": baseline, "branch_from": branch_from}
    if dry_run or _training.starts_ranks(processes):
        job = api.resolve_job(recipe, out, resume, **models)
        if dry_run:
            _training.print_dry_run(job, processes, as_json)
            return
        _training.start_ranks(processes, job.recipe, quiet)
    result = api.train(recipe, out, **models, resume=resume, verbose=not quiet)
    finish(result.record, as_json)
