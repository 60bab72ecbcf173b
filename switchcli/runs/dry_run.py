"""The dry run of a training verb: open what the recipe names, so that a recipe that it accepts runs.

No text is prepared, no tokenizer is trained, and nothing is written.
"""

from typing import Any

from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.recipe.schema import TaskRecipe, TextRecipe
from switchcli.runs.pretraining import check_tokenizer_fits
from switchcli.tasks import reading
from switchcli.tasks.config import tasks_of


def open_inputs(job: Any) -> None:
    """Open the tokenizer and the data of a resolved command line. Its checkpoints are open already.

    Of each corpus the first document is read, and of each task the first example. Tasks of a hub are left out: reading
    one would download it.

    Raises:
        RecipeError: the tokenizer does not fit the model.
        DataError: a file or an address cannot be read, or holds no text.
    """
    recipe = job.recipe
    if isinstance(recipe, TextRecipe):
        tokenizer = _tokenizer(job, recipe)
        if tokenizer is not None:
            check_tokenizer_fits(recipe, tokenizer)
        for corpora in recipe.data.texts().values():
            for corpus in corpora:
                next(corpus.documents())  # raises an error if there is none
    elif isinstance(recipe, TaskRecipe):
        for task in tasks_of(recipe.tasks).values():
            for split in ("train", recipe.scoring.split):
                if reading.has_split(task, split):
                    reading.check_readable(task, split, recipe.data.folder)


def _tokenizer(job: Any, recipe: TextRecipe) -> Tokenizer | None:
    """Return the tokenizer of the run, or None if the run is to train it."""
    for name in ("branch", "teacher", "start"):
        handle = getattr(job, name, None)
        if handle is not None:
            assert isinstance(handle.tokenizer, Tokenizer)
            return handle.tokenizer
    named = recipe.data.tokenizer
    return None if named.kind == "train" else named.load(dict)
