"""What the training verbs do with a resolved job: describe it, start ranks, train, print the result."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer

from switchcli.commands import exit
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.output import print_json
from switchcli.report.safe_text import safe_text
from switchcli.runs import describe, run_dir
from switchcli.runs.trainer import train
from switchcli.runs.training_task import TrainingTask


class Asked(NamedTuple):
    """How a training verb is to run: the options that all of them have."""

    out: Path
    resume: bool
    processes: int
    dry_run: bool
    as_json: bool
    quiet: bool


def run(job: Any, task_type: type[TrainingTask], asked: Asked) -> None:
    """Train, or describe the run; `job` has the recipe, and what else `task_type` takes."""
    if asked.dry_run:
        show_recipe(job.recipe, asked.as_json)
        return
    start_ranks(asked.processes, job.recipe, asked.as_json)
    end(train(job, task_type, asked.out, asked.resume, asked.quiet), asked.as_json)


def show_recipe(recipe: TrainingRecipe, as_json: bool) -> None:
    """Print what the recipe comes to."""
    if as_json:
        print_json(describe.dry_run(recipe))
    else:
        typer.echo(safe_text(describe.text(recipe)), nl=False)


def start_ranks(processes: int, recipe: TrainingRecipe | EvalRecipe, as_json: bool) -> None:
    """Let as many ranks do the work as are asked for, and leave with their exit code; or go on in this process."""
    if (ended := run_dir.ranks_elsewhere(processes, recipe)) is not None:
        if as_json and ended.error is not None:
            print_json({"error": ended.error, "exit_code": ended.exit_code})
        exit.leave_with(ended.exit_code)


def end(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the result, if it is asked for, and leave the ranks."""
    if as_json and result:
        print_json(result)
    exit.leave_rank()
