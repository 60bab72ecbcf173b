"""`switchcli launch`: a run on several machines, by SLURM or by torchrun. Imports no torch."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Annotated

import typer

from switchcli.commands import _completion
from switchcli.commands._flag_hints import flag_hint
from switchcli.commands._help import epilog
from switchcli.commands._options import refuse_option
from switchcli.commands.sweep import check_command
from switchcli.errors import DistributedError, RecipeError
from switchcli.recipe.key_index import VERBS
from switchcli.report.safe_text import shell_words
from switchcli.runs.sweep import cluster

app = typer.Typer()
_FROM_CHECKPOINT = ("--model", "--branch-from", "start")
"""How arguments begin that name a checkpoint to start from."""


def _check_time(time: str) -> str:
    """Return the value of --time. Raises RecipeError for anything that is no time limit of sbatch."""
    if not re.fullmatch("[0-9]+(:[0-9]+){0,2}|[0-9]+-[0-9]+(:[0-9]+){0,2}|UNLIMITED", time):
        raise RecipeError("--time: must be hours:minutes:seconds or days-hours, such as 24:00:00")
    return time


@app.command(
    context_settings={"ignore_unknown_options": True},
    epilog=epilog(
        "how-to/many-gpus",
        "switchcli launch --torchrun --ranks 8 -- pretrain pretrain/switch-base-8",
        "switchcli launch --slurm --nodes 4 -- pretrain pretrain/switch-base-8",
    ),
)
def launch(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="-- VERB ...",
            help="The command to run on the ranks.",
            autocompletion=_completion.command_words,
        ),
    ],
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit a SLURM job that saves and requeues in time.")] = False,
    torchrun: Annotated[
        bool, typer.Option("--torchrun", help="Start this machine's ranks; run the same command on each machine.")
    ] = False,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Number of machines.")] = 1,
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Ranks per machine. Default: 8 with --slurm, one per GPU with --torchrun."
        ),
    ] = None,
    time: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="With --slurm: time limit of the job, as hours:minutes:seconds.", callback=_check_time
        ),
    ] = "24:00:00",
    cpus: Annotated[int, typer.Option(metavar="N", min=1, help="With --slurm: processors per rank.")] = 8,
    gpus: Annotated[bool, typer.Option(help="With --slurm: ask for one GPU per rank.")] = True,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="With --slurm: a further option of sbatch; may be repeated."),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="HOST",
            help="With --torchrun: host name or address where the machines meet. Default: localhost.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="N", min=1, max=65535, help="With --torchrun: the port on that host.")
    ] = 29500,
    restarts: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="With --torchrun: restarts from the last checkpoint when a rank dies."),
    ] = 3,
    print_only: Annotated[bool, typer.Option("--print", help="Print the job script or the command, and stop.")] = False,
) -> None:
    """Run a verb on several machines that see the same folders, by SLURM or by torchrun."""
    if slurm == torchrun:
        raise RecipeError("launch: give one of --slurm and --torchrun")
    if arguments[0].startswith("-"):
        known = flag_hint(context, arguments[0].partition("=")[0], arguments)
        hint = f": use {known}" if known else ""
        hint += "; give options of sbatch as --sbatch=OPTION" if slurm and not known else ""
        raise RecipeError(f"{arguments[0]}: no such option of launch{hint}; the command begins after --")
    _check_launched(arguments, torchrun)
    for name in ("head", "port", "restarts") if slurm else ("time", "cpus", "gpus", "sbatch"):
        refuse_option(context, name, f"cannot be used with {'--slurm' if slurm else '--torchrun'}")
    if slurm:
        if any(option.startswith(("--array", "-a")) for option in sbatch or ()):
            raise RecipeError("--sbatch: cannot be --array: --nodes is the number of tasks of `data prepare`")
        machines = cluster.Nodes(nodes, ranks or 8, cpus, time, gpus, tuple(sbatch or ()))
        make = cluster.slurm_preparation if arguments[:2] == ["data", "prepare"] else cluster.slurm_job
        script = make(arguments, machines)
        if print_only:
            typer.echo(script, nl=False)
            return
        if shutil.which("sbatch") is None:
            raise DistributedError(
                "sbatch: not found: run this on a machine of the cluster, or save the script by --print"
            )
        _check_now(arguments, nodes * machines.ranks)
        raise typer.Exit(subprocess.run(["sbatch"], input=script, text=True, check=False).returncode)
    if head is None:
        if nodes > 1:
            raise RecipeError("--head: missing: the host name or address of one of the machines, the same on each")
        head = "localhost"
    command = cluster.torchrun_command(arguments, head, port, nodes, ranks, restarts)
    if print_only:
        typer.echo(shell_words(*command))
        return
    _check_now(arguments, nodes * ranks if ranks else None)
    os.execvp(command[0], command)


def _check_now(arguments: Sequence[str], ranks: int | None) -> None:
    """Raise RecipeError for what the command would refuse on every rank. A printed script may be for another place."""
    from switchcli.recipe.resolve import resolve  # here: the schema takes a second, and --help lists this verb
    from switchcli.recipe.schema import PretrainRecipe

    if arguments[0] not in VERBS:
        return
    is_from_scratch = arguments[0] == "pretrain" and not any(word.startswith(_FROM_CHECKPOINT) for word in arguments)
    given = check_command(arguments, rules=is_from_scratch)
    if given.get("dry_run"):
        raise RecipeError("--dry-run: needs no other machine: run the command without launch")
    if is_from_scratch and ranks is not None:
        resolve(given["recipe"], given["overrides"] or [], PretrainRecipe).check_ranks(ranks)


def _check_launched(arguments: Sequence[str], torchrun: bool) -> None:
    """Raise RecipeError unless the command can run on several machines, and again after a restart."""
    if arguments[0] not in (*VERBS, "data"):
        raise RecipeError(f"{arguments[0]}: must be one of {', '.join(VERBS)}, data prepare")
    if arguments[0] == "data" and (arguments[1:2] != ["prepare"] or torchrun):
        raise RecipeError(
            "data: of its commands `data prepare` can be launched, by --slurm, whose tasks share the work"
        )
    if "--no-resume" in arguments:
        raise RecipeError(
            "--no-resume: would archive the run at each restart of the job: start over in another folder by --out"
        )
