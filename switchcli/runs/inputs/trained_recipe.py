"""The recipe of the run that trained a checkpoint: for training and evaluation, which need more than its model."""

from pathlib import Path

from switchcli.checkpoint.documents import RECIPE
from switchcli.errors import CheckpointError
from switchcli.recipe import resolve, yaml_nodes
from switchcli.recipe.schema import schema_of
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.runs.inputs.loading import CheckpointHandle


def trained_recipe(handle: CheckpointHandle) -> TrainingRecipe | None:
    """Return the recipe of the run that trained the checkpoint; None if no run did. Raises like `read_recipe`."""
    return None if handle.recipe is None else read_recipe(handle.recipe, handle.path / RECIPE)


def read_recipe(document: bytes, path: Path) -> TrainingRecipe:
    """Return the recipe that a run wrote to a file, by the schema of the verb that wrote it.

    Raises:
        CheckpointError: there is no such verb, or it does not train.
        RecipeError: it is not the recipe of a run.
    """
    tree = resolve.parse_saved(document, yaml_nodes.display_path(path))
    schema = schema_of(tree)
    if schema is None or not issubclass(schema, TrainingRecipe):
        raise CheckpointError(
            f"{path.parent}: written by the verb {tree.stated('verb')}, which this switchcli does not have"
        )
    return resolve.validate(tree, schema)
