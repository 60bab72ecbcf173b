"""`--dry-run`: what a recipe comes to, from the recipe alone; no model is allocated and no text is read."""

from typing import Any

from switchcli.model.count import count
from switchcli.recipe.resolve import dump
from switchcli.recipe.schema import PretrainRecipe
from switchcli.report.console import Console


def describe(recipe: PretrainRecipe) -> dict[str, Any]:
    """Parameters, FLOPs and tokens of a run; FLOPs are forward, by the formula of paper section 5.6."""
    spans = recipe.data.span_corruption
    counted = count(recipe.model, spans.inputs_length, spans.targets_length)
    tokens = recipe.train.steps * recipe.train.batch_tokens
    return {
        "parameters": counted.parameters,
        "dense_parameters": counted.dense,
        "expert_parameters": counted.expert,
        "active_parameters": counted.active,
        "flops_per_sequence": counted.flops,
        "inputs_length": spans.inputs_length,
        "targets_length": spans.targets_length,
        "sequences_per_step": recipe.train.batch_tokens // spans.inputs_length,
        "steps": recipe.train.steps,
        "input_tokens": tokens,
        "target_tokens": tokens // spans.inputs_length * spans.targets_length,
    }


def dry_run(recipe: PretrainRecipe) -> dict[str, Any]:
    """The description with the resolved recipe; what `--json` prints."""
    return {**describe(recipe), "recipe": recipe.model_dump(mode="json")}


def show(recipe: PretrainRecipe, console: Console, results: Console) -> None:
    """The same for people: the recipe on `results`, the figures on `console`."""
    results.message(dump(recipe).rstrip())
    console.table("what this comes to", {key: _grouped(value) for key, value in describe(recipe).items()})


def _grouped(value: int) -> str:
    return f"{value:,}"
