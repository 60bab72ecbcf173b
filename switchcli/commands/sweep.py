"""`switchcli sweep`: many runs by one command, as many at once as there are GPUs or processors. Imports no torch."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_group

from switchcli.commands import _exit, distill, finetune, pretrain
from switchcli.commands import eval as evaluate
from switchcli.commands._options import (
    Json,
    Quiet,
    check_folder,
    complete_recipes,
    epilog,
    split_arguments,
)
from switchcli.commands._parsing import extend_command
from switchcli.commands._result import Line, finish
from switchcli.errors import Interrupted, InterruptedByForce, RecipeError
from switchcli.sweep import sweep_list
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shell_words

app = typer.Typer()
_APPS = {"pretrain": pretrain.app, "finetune": finetune.app, "distill": distill.app, "eval": evaluate.app}
"""The commands of the verbs that a run of a sweep may have."""


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
            autocompletion=complete_recipes,
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a grid or a list of runs; complete runs are skipped, and interrupted ones resume.

    A failed run stops no others, except those that need it. The exit code is then 1.
    """
    from switchcli.sweep.sweep_runner import Sweep, available_slots, command

    runs = sweep_list.parse_sweep(arguments, out)
    if errors := [*_errors(runs, out), *([] if print_only else sweep_list.missing_runs(runs, out))]:
        raise RecipeError(*errors)
    if print_only:
        commands = {run.name: command(run, out) for run in runs}
        result = {"out": str(out), "runs": [{"name": name, "command": words} for name, words in commands.items()]}
        finish(result, as_json, [Line(shell_words(*words), wrap=False) for words in commands.values()])
        return
    console = Console(quiet=quiet)
    started = Sweep(runs, out, available_slots(jobs, len(runs)), console)
    with _exit.interruptible():
        started.run()
    has_failed = False
    for name, outcome in started.outcomes.items():
        if outcome.status in ("failed", "not started"):
            has_failed = True
            console.warning(f"failed: {name}: {outcome.reason}")
    if started.stopped:
        stop = InterruptedByForce(_exit.FORCED) if started.killed else Interrupted("stopped: the same command resumes")
        stop.result = started.to_json()
        raise stop
    finish(started.to_json(), as_json, exit_code=int(has_failed))


def _errors(runs: Sequence[sweep_list.SweepRun], out: Path) -> Iterator[str]:
    """Yield what is wrong with the commands of runs, before any starts. An error that several share is told once."""
    names: dict[str, list[str]] = {}
    for run in runs:
        try:
            _check_command(run.arguments, out)
        except RecipeError as error:
            for line in error.lines:
                names.setdefault(line, []).append(run.name)
    for line, (first, *others) in names.items():
        yield f"{first}: {line}" + (f" (and {len(others)} more)" if others else "")


def _check_command(command: Sequence[str], out: Path) -> None:
    """Check the options and the recipe of a command.

    A checkpoint that it starts from is not opened: it may not exist yet.

    Raises:
        RecipeError: the command line or the recipe is wrong, or an option names a checkpoint that does not exist, and
            is not in `out`.
    """
    from switchcli.recipe import resolve  # here: the schema takes a second, and --help lists this verb
    from switchcli.recipe.messages import UnknownKey
    from switchcli.recipe.schema import RECIPES, resolve_standalone

    verb, *arguments = command
    (parser,) = get_group(_APPS[verb]).commands.values()
    extend_command(parser)
    given = parser.make_context(f"switchcli {verb}", arguments).params
    recipe, overrides = given.get("recipe"), given.get("overrides") or []
    if "arguments" in given:  # [RECIPE] [KEY=VALUE ...]
        recipe, overrides = split_arguments(given["arguments"] or [])
    for option in ("model", "teacher", "checkpoint", "student", "baseline", "branch_from"):
        value = given.get(option)
        if value is not None and not _is_found(option, str(value), out):
            name = option.replace("_", "-")
            raise RecipeError(f"{name} ({value}): no such folder: name a checkpoint, or a run of an earlier stage")
    start = [resolve.override("start.checkpoint", str(given["model"]))] if given.get("model") is not None else []
    try:
        resolve_standalone(recipe, [*overrides, *start, f"verb={verb}"])
    except RecipeError as error:
        if recipe is not None:
            resolve.check_verb(resolve.load(recipe, overrides), RECIPES[verb])  # the reason of most other errors
        lines = error.args
        # The checkpoint may have the other keys, and tasks of its own.
        if recipe is None or verb == "eval":
            lines = tuple(line for line in lines if isinstance(line, UnknownKey))
        if lines:
            raise RecipeError(*(_with_fix(line, overrides) for line in lines)) from error


def _is_found(option: str, value: str, out: Path) -> bool:
    """Return whether an option names a folder that exists or will be in `out`, or is a size or a metric instead."""
    if Path(value).exists() or sweep_list.named_run(value, out) is not None:
        return True
    if option == "student":
        from switchcli.recipe.sizes import SIZES

        return value in SIZES
    if option == "baseline":
        return re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?", value, re.IGNORECASE) is not None
    run_of_step = re.fullmatch("(.+)@[0-9]+", value) if option == "branch_from" else None
    return run_of_step is not None and Path(run_of_step[1]).exists()


def _with_fix(line: str, overrides: Sequence[str]) -> str:
    """Add how to write several values to an error about a key whose value is a list."""
    for override in overrides:
        key, _, value = override.partition("=")
        if f"{key}:" in line and value.startswith("[") and value.endswith("]"):
            return f"{line}; for a run of each value write {key}={value[1:-1].replace(' ', '')}"
    return line
