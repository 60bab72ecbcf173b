"""Write a new folder at a DESTINATION, completely or not at all. Shared by convert, upcycle and prune."""

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from switchcli.checkpoint import checkpoint, tensor_file
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import CheckpointError, disk_errors
from switchcli.model.flops import count
from switchcli.recipe.resolve import dump
from switchcli.recipe.training_recipe import TrainingRecipe
from switchcli.report.safe_text import shell_words
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.runs.inputs.transformers_checkpoint import meta_model
from switchcli.system import publish
from switchcli.training.checkpointer import DATA, logical_tensors
from switchcli.training.config import StartSpec
from switchcli.training.state import TrainState


def check_destination(source: Path, destination: Path) -> Path:
    """Return the absolute path of `destination`, and remove leftovers of a killed command there.

    Raises:
        CheckpointError: it lies within `source`, or exists and is not an empty folder.
    """
    path = destination.resolve()
    publish.remove_stale(path)
    if path.is_relative_to(source.resolve()):
        raise CheckpointError(f"{destination}: within the source {source}: give a DESTINATION outside of it")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{destination}: exists already: give a new or an empty folder as DESTINATION")
    return path


def check_checkpoint_destination(source: Path, destination: Path) -> Path:
    """Check the destination of a new checkpoint in our layout, which is of step 0. Raises like `check_destination`."""
    if checkpoint.STEP.fullmatch(destination.resolve().name):
        raise CheckpointError(
            f"{destination}: the name of a checkpoint of that step, and a new checkpoint is of step 0: give a "
            "DESTINATION of another name"
        )
    return check_destination(source, destination)


def publish_new_folder(destination: Path, bytes_needed: int, write: Callable[[Path], Path]) -> None:
    """Publish the folder that `write` makes within a temporary folder as `destination`.

    Raises:
        CheckpointError: there is no room for `bytes_needed`, or the disk cannot be written.
    """
    with disk_errors(destination, "give another DESTINATION", bytes_needed):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with publish.temporary_folder(destination) as temporary:
            if shutil.disk_usage(temporary).free < bytes_needed:
                raise OSError(errno.ENOSPC, "not enough space")
            try:
                built = write(temporary)
            except CheckpointError as error:
                if isinstance(error.__cause__, OSError):  # of a save, whose message names the temporary folder
                    raise error.__cause__ from None
                raise
            publish.publish_folder(built, destination)


def publish_checkpoint(
    destination: Path,
    recipe: TrainingRecipe,
    tokenizer: Tokenizer,
    weights: Mapping[str, Tensor],
    extra_documents: Mapping[str, bytes] | None = None,
) -> int:
    """Write a checkpoint of step 0 in our layout, without optimizer state. Return its number of parameters.

    `weights` are keyed by logical name, `extra_documents` by file name.
    """
    tensors = logical_tensors(meta_model(recipe.model)).values()
    documents = {
        "state.json": TrainState().to_json({}),
        "recipe.yaml": dump(recipe).encode(),
        "tokenizer.json": tokenizer.to_json().encode(),
        **(extra_documents or {}),
    }
    publish_new_folder(
        destination,
        tensor_file.num_bytes(tensors),
        lambda temporary: checkpoint.save(temporary, 0, model=weights, optimizer={}, documents=documents),
    )
    return count(recipe.model).parameters


def continuation_recipe(recipe: TrainingRecipe, checkpoint: Path) -> TrainingRecipe:
    """Return the recipe with `checkpoint` as its start, if its verb can start from a checkpoint."""
    if not recipe.starts_from_weights:
        return recipe
    return recipe.model_copy(update={"start": StartSpec(checkpoint=str(checkpoint), keep="weights")})


def next_command(source: CheckpointHandle, recipe: TrainingRecipe, checkpoint: Path) -> str:
    """Return the next command for a checkpoint that is made of `source`.

    Train it further, by a recipe of the user's if there is none of its training, or evaluate it if its verb has no
    start.
    """
    if not source.has_training_recipe:
        model = shell_words("--model", checkpoint, "start.keep=weights")
        return f"pretrain (or finetune) RECIPE {model} --out FOLDER"
    file = shell_words(checkpoint / "recipe.yaml")
    if recipe.starts_from_weights:
        return f"{recipe.verb} {file} --out FOLDER"
    return f"eval {shell_words(checkpoint)}"


def data_document(handle: CheckpointHandle) -> dict[str, bytes]:
    """Return the document with the identity of a checkpoint's training data, keyed by its file name, or nothing.

    A checkpoint that is made from this one gets it too, so that `switchcli eval` measures it on the same text.
    """
    return {DATA: handle.native.document(DATA)} if handle.native and handle.has_training_recipe else {}
