"""`switchcli finetune`: a trained model on text-to-text tasks (section 4.1)."""

from collections.abc import Sequence

from switchcli.commands import exit, training
from switchcli.recipe.schema import FinetuneRecipe
from switchcli.runs import warm_start
from switchcli.runs.finetuning import Finetuning, check_tasks


def run(recipe: str, overrides: Sequence[str], model: str | None, asked: training.Asked) -> None:
    """Resolve the recipe, with what the checkpoint `model` says of it, and train."""
    job = warm_start.resolve_job(recipe, overrides, model, asked.out, asked.resume, exit.console(), FinetuneRecipe)
    check_tasks(job.recipe)
    training.run(job, Finetuning, asked)
