"""`--dry-run`: what a recipe comes to, from the recipe alone; no model is allocated and no text is read."""

from typing import Any

from switchcli.model.flops import count
from switchcli.recipe.resolve import dump
from switchcli.recipe.training_rules import TrainingRecipe


def describe(recipe: TrainingRecipe) -> dict[str, Any]:
    """Parameters, FLOPs and tokens of a run; FLOPs are forward, by the formula of paper section 5.6."""
    counted = count(recipe.model, recipe.inputs_length, recipe.targets_length)
    tokens = recipe.train.steps * recipe.train.batch_tokens
    return {
        "parameters": counted.parameters,
        "dense_parameters": counted.dense,
        "expert_parameters": counted.expert,
        "active_parameters": counted.active,
        "flops_per_sequence": counted.flops,
        "inputs_length": recipe.inputs_length,
        "targets_length": recipe.targets_length,
        "sequences_per_step": recipe.rows_per_step,
        "steps": recipe.train.steps,
        "input_tokens": tokens,
        "target_tokens": tokens // recipe.inputs_length * recipe.targets_length,
    }


def dry_run(recipe: TrainingRecipe) -> dict[str, Any]:
    """The description with the resolved recipe; what `--json` prints."""
    return {**describe(recipe), "recipe": recipe.model_dump(mode="json")}


def text(recipe: TrainingRecipe) -> str:
    """The same for people: the figures as comments above the resolved recipe, so that the whole is a recipe still."""
    figures = [f"# {name.replace('_', ' ')}: {value:,}\n" for name, value in describe(recipe).items()]
    return "".join([*figures, dump(recipe)])
