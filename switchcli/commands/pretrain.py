"""`switchcli pretrain`: a recipe into a trained, evaluated, resumable model, on plain text."""

from collections.abc import Sequence

from switchcli.commands import exit, training
from switchcli.recipe.schema import PretrainRecipe
from switchcli.runs import warm_start
from switchcli.runs.pretraining import Pretraining


def run(recipe: str, overrides: Sequence[str], model: str | None, asked: training.Asked) -> None:
    """Resolve the recipe, with what the checkpoint `model` says of it, and train."""
    job = warm_start.resolve_job(recipe, overrides, model, asked.out, asked.resume, exit.console(), PretrainRecipe)
    training.run(job, Pretraining, asked)
