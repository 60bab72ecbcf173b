"""Functions that the verbs share which train or evaluate: a common command, the dry run, the ranks, the result."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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
from switchcli.report.console import print_json
from switchcli.report.safe_text import safe_text

if TYPE_CHECKING:
    from switchcli.recipe.schema import EvalRecipe, StartedRecipe
    from switchcli.recipe.training_rules import TrainingRecipe
    from switchcli.runs.training_task import TrainingTask

TaskTypes = tuple[type["StartedRecipe"], type["TrainingTask"]]
"""The schema of a verb's recipes, and the task that it trains."""


def training_app(verb: str, help: str, load_types: Callable[[], TaskTypes]) -> typer.Typer:
    """Return the command of a verb that trains a model by a recipe, from scratch or from a checkpoint.

    `load_types` imports torch, so it is called only when the command runs.
    """
    app = typer.Typer()

    @app.command(verb, help=help)
    def train(
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
        with _exit.interruptible(ranks=True):
            from switchcli.runs import trainer, warm_start

            schema, task_type = load_types()
            out = out or default_out(recipe)
            job = warm_start.resolve_job(recipe, overrides or [], model, out, resume, _exit.console(), schema)
            task_type.check_recipe(job.recipe)
            if dry_run:
                print_dry_run(job.recipe, as_json)
                return
            start_ranks(processes, job.recipe, as_json)
            with trainer.open_trainer(job, task_type, out, resume, quiet) as run:
                result = run.run()
            finish(result, as_json)

    return app


def print_dry_run(recipe: "TrainingRecipe", as_json: bool) -> None:
    """Print the resolved recipe with its model size, FLOPs and tokens, as YAML or as a JSON object."""
    from switchcli.runs import planning

    if as_json:
        print_json({**planning.describe(recipe), "recipe": recipe.model_dump(mode="json")})
    else:
        typer.echo(safe_text(planning.describe_as_yaml(recipe)), nl=False)


def start_ranks(processes: int, recipe: "TrainingRecipe | EvalRecipe", as_json: bool) -> None:
    """Run this command as several ranks and exit with their exit code. Return if this process does the work."""
    from switchcli.runs import run_dir

    ended = run_dir.launch_ranks(processes, recipe, _exit.console())
    if ended is None:
        return
    if as_json and ended.error is not None:
        print_json({"error": ended.error, "exit_code": ended.exit_code})
    _exit.exit_with(ended.exit_code)


def finish(result: Mapping[str, Any], as_json: bool) -> None:
    """Print the result with `as_json`, and end this process if it is a rank. Off the main rank the result is empty."""
    if as_json and result:
        print_json(result)
    _exit.exit_rank()
