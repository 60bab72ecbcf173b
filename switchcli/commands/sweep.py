"""`switchcli sweep`: many runs by one command, as many at once as there are GPUs or processors. Imports no torch."""

from pathlib import Path
from typing import Annotated

import typer

from switchcli.commands import _completion
from switchcli.commands._help import epilog
from switchcli.commands._options import Json, Quiet, check_folder
from switchcli.errors import Interrupted, RecipeError
from switchcli.report.console import Console, print_json
from switchcli.report.safe_text import shell_words
from switchcli.runs import cluster, sweep_list

app = typer.Typer()


@app.command(
    context_settings={"ignore_unknown_options": True},
    epilog=epilog(
        "how-to/sweeps",
        "switchcli sweep pretrain quickstart/switch train.seed=0,1,2",
        "switchcli sweep pretrain quickstart/switch model.num_experts=2,4,8 --print",
    ),
)
def sweep(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="LIST [KEY=VALUE ...] | VERB RECIPE [KEY=VALUE,VALUE ...]",
            help="A file that lists runs, or a command whose keys may have several values, separated by commas.",
            autocompletion=_completion.command_words,
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="Folder of the runs' folders.", callback=check_folder)
    ] = Path("runs/sweep"),
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Number of runs at once. Default: one per GPU, else one per processor."),
    ] = None,
    print_only: Annotated[
        bool, typer.Option("--print", "--dry-run", help="Print the commands of the runs, and stop.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Print a shell script that submits the runs as SLURM job arrays, and stop.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid or a list of runs; complete runs are skipped, and interrupted ones resume.

    A failed run stops no others, except those that need it. The exit code is then 1.
    """
    from switchcli.runs.sweep_runner import STOPPED, Sweep, available_slots, command

    if slurm and as_json:
        raise RecipeError("--json: cannot be used with --slurm, which prints a shell script")
    runs = sweep_list.parse_sweep(arguments, out)
    if print_only and as_json:
        print_json({"out": str(out), "runs": [{"name": run.name, "command": command(run, out)} for run in runs]})
        return
    if print_only:
        for run in runs:
            typer.echo(shell_words(*command(run, out)))
        return
    if errors := list(sweep_list.missing_runs(runs, out)):
        raise RecipeError(*errors)
    if slurm:
        typer.echo(cluster.slurm_sweep(runs, out, cluster.Nodes()), nl=False)
        return
    console = Console(quiet=quiet)
    started = Sweep(runs, out, available_slots(jobs), console)
    started.run()
    has_failed = False
    for name, outcome in started.outcomes.items():
        if outcome.status in ("failed", "not started") and outcome.reason != STOPPED:
            has_failed = True
            console.warning(f"failed: {name}: {outcome.reason}")
    if started.stopped:
        raise Interrupted("stopped: the same command resumes")
    if as_json:
        print_json(started.to_json())
    if has_failed:
        raise typer.Exit(1)
