"""Write a new folder at a DESTINATION, completely or not at all. Shared by convert, upcycle and prune."""

import errno
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from switchcli.checkpoint import checkpoint, tensor_file
from switchcli.checkpoint.documents import DATA, MODEL_FILE, RECIPE, ModelFile
from switchcli.checkpoint.model_weights import logical_tensors, meta_model
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import CheckpointError, disk_errors
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.recipe import yaml_nodes
from switchcli.runs.inputs.loading import CheckpointHandle
from switchcli.system import publish
from switchcli.terminal.safe_text import shell_words
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
    model_file: ModelFile,
    tokenizer: Tokenizer,
    weights: Mapping[str, Tensor],
    trained: Mapping[str, bytes] | None = None,
) -> int:
    """Write a checkpoint of step 0 in our layout, without optimizer state. Return its number of parameters.

    `weights` are keyed by logical name. `trained` are the `trained_documents` of the checkpoint that it is made of.
    """
    tensors = logical_tensors(meta_model(model_file.model)).values()
    documents = {
        "state.json": TrainState().to_json({}),
        MODEL_FILE: model_file.to_json(),
        "tokenizer.json": tokenizer.to_json().encode(),
        **(trained or {}),
    }
    publish_new_folder(
        destination,
        tensor_file.num_bytes(tensors),
        lambda temporary: checkpoint.save(temporary, 0, model=weights, optimizer={}, documents=documents),
    )
    return count(model_file.model).parameters


def trained_documents(source: CheckpointHandle, spec: ModelSpec, destination: Path) -> dict[str, bytes]:
    """Return the documents about the training of `source` for a checkpoint of `spec` that is made of it.

    They are the recipe of its run with the new model, which starts from the new checkpoint, and the identity of its
    data, so that it is trained further, and evaluated, on the same data. There are none if no run trained `source`.
    """
    if source.native is None or source.recipe is None:
        return {}
    tree = yaml_nodes.read_bytes(source.recipe, str(source.path / RECIPE))
    if not isinstance(tree.value, dict):
        return {}
    before, after = source.spec.num_experts, spec.num_experts
    recipe = {**yaml_nodes.plain(tree), "model": spec.model_dump(mode="json")}
    if after != before:
        recipe["description"] = f"{after} experts in each sparse layer, of a model that had {before}"
    if isinstance(ranks := tree.stated("parallel.expert"), int):  # they must divide the experts
        recipe["parallel"]["expert"] = math.gcd(ranks, after)
    if tree.stated("verb") != "distill":  # which can only continue a distillation
        recipe["start"] = {"checkpoint": str(destination), "keep": "weights"}
    return {RECIPE: yaml_nodes.write(recipe).encode(), DATA: source.native.document(DATA)}


def next_command(checkpoint: Path, documents: Mapping[str, bytes]) -> str:
    """Return the next command for a new checkpoint with these `trained_documents`.

    Train it further, by a recipe of the user's if there is none of its training, or evaluate it if its verb has no
    start.
    """
    if RECIPE not in documents:
        model = shell_words("--model", checkpoint, "start.keep=weights")
        return f"pretrain (or finetune) RECIPE {model} --out FOLDER"
    verb = yaml_nodes.read_bytes(documents[RECIPE], RECIPE).stated("verb")
    if verb == "distill":
        return f"eval {shell_words(checkpoint)}"
    return f"{verb} {shell_words(checkpoint / RECIPE)} --out FOLDER"
