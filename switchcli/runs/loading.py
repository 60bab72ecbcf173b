"""A CHECKPOINT on the command line into a model with its tokenizer.

It is a run's folder (its newest is taken), one checkpoint's, or a folder in the Hugging Face layout.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from switchcli.checkpoint import checkpoint, manifest
from switchcli.convert import hub
from switchcli.convert.weight_files import is_hugging_face_folder
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.layout import unsharded_weights
from switchcli.errors import CheckpointError, SwitchError
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import resolve, yaml_nodes
from switchcli.recipe.schema import schema_of
from switchcli.recipe.training_rules import TrainingRecipe
from switchcli.report.console import Console
from switchcli.runs import transformers_checkpoint
from switchcli.train.checkpointer import DATA, load_weights, logical_tensors


class CheckpointHandle(NamedTuple):
    """A checkpoint whose small files were read; its weights are read when they are asked for."""

    path: Path
    step: int
    recipe: TrainingRecipe
    tokenizer: Tokenizer
    weights: Callable[[], Mapping[str, torch.Tensor]]
    """Under their logical names; each is read when it is asked for."""
    own: checkpoint.Checkpoint | None
    """Where it is in our layout: it may have optimizer state too."""

    @property
    def has_training_recipe(self) -> bool:
        """Whether its recipe says how it was trained; that of a converted one does not."""
        return self.own is not None and DATA in self.own.manifest.names()

    def identity(self) -> str:
        """A digest of what the model computes: its shape, its routing, its precision, its weights."""
        own = self.recipe
        digest = hashlib.sha256(f"{own.model.model_dump_json()} {own.train.precision}".encode())
        if self.own is not None:
            digest.update(repr([one.sha256 for one in self.own.manifest.entries if "model-" in one.name]).encode())
        else:
            for name, weight in self.weights().items():
                digest.update(name.encode())
                digest.update(weight.contiguous().numpy().data)
        return digest.hexdigest()


class LoadedModel(NamedTuple):
    """A model in evaluation mode with what it was trained by."""

    path: Path
    step: int
    recipe: TrainingRecipe
    tokenizer: Tokenizer
    model: SwitchTransformer


def open_model(path: Path, console: Console) -> CheckpointHandle:
    """Open and verify the checkpoint at `path`.

    Raises:
        CheckpointError: there is none, or none that is whole.
        DataError: no tokenizer.
    """
    if is_hugging_face_folder(path):
        foreign, tokenizer, weights = transformers_checkpoint.read(path)
        return CheckpointHandle(path, 0, foreign, tokenizer, lambda: weights, None)
    found = open_checkpoint(path, console)
    try:
        recipe, tokenizer = read_documents(found)
        held = found.read("model", logical_tensors(transformers_checkpoint.meta_model(recipe.model)))
    except (SwitchError, OSError):
        if found.path.exists():
            raise
        return open_model(path, console)  # the run at work there has just removed it, so there are newer ones
    return CheckpointHandle(found.path, found.step, recipe, tokenizer, lambda: held, found)


def load_checkpoint(path: Path, device: torch.device, console: Console) -> LoadedModel:
    """Open, verify and read the checkpoint at `path`.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    return load_model(open_model(path, console), device)


def load_model(opened: CheckpointHandle, device: torch.device) -> LoadedModel:
    """The model of an open checkpoint."""
    model = empty_model(opened.recipe, device)
    load_weights(unsharded_weights(model), opened.weights())
    return LoadedModel(opened.path, opened.step, opened.recipe, opened.tokenizer, model)


def empty_model(recipe: TrainingRecipe, device: torch.device) -> SwitchTransformer:
    """The model of a recipe in evaluation mode, its weights whatever the memory holds."""
    with torch.device("meta"):
        model = SwitchTransformer(recipe.model, recipe.train.router_dtype)
    return model.to_empty(device=device).eval()


def open_checkpoint(path: Path, console: Console) -> checkpoint.Checkpoint:
    """The checkpoint of a run's folder, or of that name, in our layout. Raises CheckpointError when there is none."""
    folder, is_one = locate(path)
    found = None
    if is_one:
        found = checkpoint.Checkpoint.open(folder)
    elif folder.is_dir():
        found = checkpoint.latest_read_only(folder, console.warning)
    if found is None:
        hint = on_the_hub(str(path))
        raise CheckpointError(
            f"{path}: no checkpoint there: name a run's folder, or one of its checkpoints/step-*{hint and f'; {hint}'}"
        )
    return found


def locate(path: Path) -> tuple[Path, bool]:
    """The folder of a run's checkpoints, or one of them; and whether it is one, or was: its MANIFEST may be lost."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return folder, (folder / manifest.NAME).is_file() or (
        folder.is_dir() and bool(checkpoint.STEP.fullmatch(folder.name))
    )


def on_the_hub(name: str) -> str:
    """What to do if `name` is one on the hub; nothing if it cannot be, or is a folder."""
    if Path(name).exists() or not hub.is_repository_id(name):
        return ""
    return f"if it is a name on the hub, `switchcli convert {name} FOLDER --to switchcli` makes a checkpoint of it"


def read_documents(found: checkpoint.Checkpoint) -> tuple[TrainingRecipe, Tokenizer]:
    """The recipe and the tokenizer of a checkpoint."""
    recipe = saved_recipe(found)
    tokenizer = Tokenizer.from_bytes(found.document("tokenizer.json"), str(found.path / "tokenizer.json"))
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise CheckpointError(
            f"{found.path}: its tokenizer has {tokenizer.vocab_size} pieces, its embedding {recipe.model.vocab_size} "
            "rows: the one is not the other's; use a checkpoint that a run of switchcli wrote"
        )
    return recipe, tokenizer


def saved_recipe(found: checkpoint.Checkpoint) -> TrainingRecipe:
    """The recipe of a checkpoint, by the verb that wrote it."""
    tree = resolve.parse_saved(found.document(resolve.SAVED), yaml_nodes.display_path(found.path / resolve.SAVED))
    schema = schema_of(tree)
    if schema is None or not issubclass(schema, TrainingRecipe):
        raise CheckpointError(
            f"{found.path}: written by the verb {resolve.stated(tree, 'verb')}, which this switchcli does not have"
        )
    return resolve.validate(tree, schema)
