"""Every field of every recipe, for tests of rules that hold for all keys."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe, EvalRecipe, FinetuneRecipe, PretrainRecipe

RECIPES = (PretrainRecipe, FinetuneRecipe, DistillTextRecipe, DistillTasksRecipe, EvalRecipe)


def fields(*models: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str, FieldInfo]]:
    """Yield the fields of these models and of the models in them, each model once."""
    seen: set[type[BaseModel]] = set()
    waiting = [*models]
    while waiting:
        model = waiting.pop()
        if model not in seen:
            seen.add(model)
            for name, field in model.model_fields.items():
                yield model, name, field
                waiting += _models_in(field.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
