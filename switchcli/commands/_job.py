"""What the verbs that train or evaluate do with a resolved job: describe it, start ranks, print the result."""

from collections.abc import Mapping
from typing import Any

import typer

from switchcli.commands import _exit
from switchcli.recipe.schema import EvalRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import print_json
from switchcli.report.safe_text import safe_text
from switchcli.runs import describe, run_dir


def print_dry_run(recipe: TrainingRecipe, dry_run: bool, as_json: bool) -> bool:
    """Print what the recipe comes to, if that is all that is asked for; return whether it is."""
    if not dry_run:
        return False
    if as_json:
        print_json(describe.dry_run(recipe))
    else:
        typer.echo(safe_text(describe.text(recipe)), nl=False)
    return True


def start_ranks(processes: int, recipe: TrainingRecipe | EvalRecipe, as_json: bool) -> None:
    """Let as many ranks do the work as are asked for, and leave with their exit code; or go on in this process."""
    if (ended := run_dir.launch_ranks(processes, recipe, _exit.console())) is not None:
        if as_json and ended.error is not None:
            print_json({"error": ended.error, "exit_code": ended.exit_code})
        _exit.exit_with(ended.exit_code)


def finish(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the result, if it is asked for, and leave the ranks."""
    if as_json and result:
        print_json(result)
    _exit.exit_rank()
