"""`switchcli finetune`: train a trained model on text-to-text tasks (section 4.1). Imports torch only when it runs."""

from switchcli.commands._training import TaskTypes, training_app


def _load_types() -> TaskTypes:
    from switchcli.recipe.schema import FinetuneRecipe
    from switchcli.runs.finetuning import Finetuning

    return FinetuneRecipe, Finetuning


app = training_app(
    "finetune",
    "Train a model on text-to-text tasks; the same command goes on after a stop.",
    _load_types,
)
