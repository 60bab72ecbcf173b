"""A new folder where the user says, whole or not at all: what the verbs share that make a checkpoint of another."""

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from switchcli import publish
from switchcli.checkpoint import checkpoint, tensor_file
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import CheckpointError, disk_errors
from switchcli.recipe.resolve import dump
from switchcli.recipe.schema import StartedRecipe
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.safe_text import shell_words
from switchcli.runs.loading import CheckpointHandle
from switchcli.runs.transformers_checkpoint import meta_model
from switchcli.train.checkpointer import DATA, logical_tensors
from switchcli.train.config import StartSpec
from switchcli.train.state import TrainState


def check_destination(source: Path, destination: Path) -> Path:
    """`destination` in full, if something can be written there. Raises CheckpointError."""
    full = destination.resolve()
    publish.remove_stale(full)
    if full.is_relative_to(source.resolve()):
        raise CheckpointError(f"{destination}: within the source {source}: give a DESTINATION outside of it")
    if full.exists() and (not full.is_dir() or any(full.iterdir())):
        raise CheckpointError(f"{destination}: is there already: give a DESTINATION that is not, or an empty folder")
    return full


def check_checkpoint_destination(source: Path, destination: Path) -> Path:
    """The same for one of our checkpoints, which is of step 0."""
    if checkpoint.STEP.fullmatch(destination.resolve().name):
        raise CheckpointError(
            f"{destination}: a checkpoint of that name is that of its step, and a new one is of step 0: give a "
            "DESTINATION of another name"
        )
    return check_destination(source, destination)


def publish_new_folder(destination: Path, bytes_needed: int, write: Callable[[Path], Path]) -> None:
    """Let `write` make a folder within a temporary one, and publish that folder as `destination`."""
    with disk_errors(destination, "give another DESTINATION", bytes_needed):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with publish.temporary_folder(destination) as temporary:
            if shutil.disk_usage(temporary).free < bytes_needed:
                raise OSError(errno.ENOSPC, "not enough space")
            publish.publish_folder(write(temporary), destination)


def publish_checkpoint(
    destination: Path,
    recipe: TrainingRecipe,
    tokenizer: Tokenizer,
    weights: Mapping[str, Tensor],
    others: Mapping[str, bytes] | None = None,
) -> int:
    """Write one of our checkpoints, without optimizer, and return its number of parameters.

    `weights` come under their logical names, `others` are more documents.
    """
    wanted = logical_tensors(meta_model(recipe.model)).values()
    texts = {"recipe.yaml": dump(recipe), "tokenizer.json": tokenizer.to_json()}
    documents = {
        "state.json": TrainState().to_json({}),
        **{name: text.encode() for name, text in texts.items()},
        **(others or {}),
    }
    publish_new_folder(
        destination,
        tensor_file.num_bytes(wanted),
        lambda temporary: checkpoint.save(temporary, 0, model=weights, optimizer={}, documents=documents),
    )
    return sum(tensor.numel() for tensor in wanted)


def continuation_recipe(recipe: TrainingRecipe, checkpoint: Path) -> TrainingRecipe:
    """The recipe of a run that starts from the checkpoint, where it is of a verb that has a start."""
    if not isinstance(recipe, StartedRecipe):
        return recipe
    return recipe.model_copy(update={"start": StartSpec(checkpoint=str(checkpoint), optimizer="reset")})


def next_command(recipe: TrainingRecipe, checkpoint: Path) -> str:
    """What a user would run next: to train it further, or to ask it where its verb has no start."""
    file = shell_words(checkpoint / "recipe.yaml")
    if isinstance(recipe, StartedRecipe):
        return f"{recipe.verb} {file} --out FOLDER"
    return f"eval {shell_words(checkpoint)}"


def data_document(opened: CheckpointHandle) -> dict[str, bytes]:
    """The document that names the text which a checkpoint was trained on, so that one made of it is measured on it."""
    own = opened.own
    return {} if own is None or DATA not in own.manifest.names() else {DATA: own.document(DATA)}
