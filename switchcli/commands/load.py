"""A CHECKPOINT on the command line into a model with its tokenizer: a run's folder (its newest) or one checkpoint's."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import CheckpointError
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.resolve import resolve
from switchcli.recipe.schema import PretrainRecipe
from switchcli.train import checkpoint, manifest
from switchcli.train.saver import load_model


class Loaded(NamedTuple):
    """A model in evaluation mode with what it was trained by."""

    path: Path
    step: int
    recipe: PretrainRecipe
    tokenizer: Tokenizer
    model: SwitchTransformer


def load(path: Path, device: torch.device, warn: Callable[[str], None]) -> Loaded:
    """Open, verify and read the checkpoint at `path`.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = None
    if (folder / manifest.NAME).is_file():
        found = checkpoint.Checkpoint.open(folder)
    elif folder.is_dir():
        found = checkpoint.find(folder, warn)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint there: name a run's folder, or one of its checkpoints/step-*")
    recipe = resolve(str(found.path / "recipe.yaml"), [], PretrainRecipe)
    tokenizer = Tokenizer.from_json(found.document("tokenizer.json").decode(), str(found.path / "tokenizer.json"))
    with torch.device("meta"):
        model = SwitchTransformer(recipe.architecture)
    model = model.to_empty(device=device).eval()
    load_model(model, found)
    return Loaded(found.path, found.step, recipe, tokenizer, model)
