"""`switchcli pretrain`: train a model on plain text. Imports torch only when it runs."""

from switchcli.commands._training import TaskTypes, training_app


def _load_types() -> TaskTypes:
    from switchcli.recipe.schema import PretrainRecipe
    from switchcli.runs.pretraining import Pretraining

    return PretrainRecipe, Pretraining


app = training_app(
    "pretrain",
    "Train by span corruption, from scratch or from a --model; the same command goes on after a stop.",
    _load_types,
)
