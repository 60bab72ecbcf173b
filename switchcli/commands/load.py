"""A CHECKPOINT on the command line into a model with its tokenizer.

It is a run's folder (its newest is taken), one checkpoint's, or a folder in the Hugging Face layout.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from switchcli.commands import huggingface
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import CheckpointError
from switchcli.interop import hub
from switchcli.interop.files import is_layout
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.resolve import resolve
from switchcli.recipe.schema import PretrainRecipe
from switchcli.train import checkpoint, manifest
from switchcli.train.saver import fill, logical_tensors


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
    if is_layout(path):
        recipe, tokenizer, weights = huggingface.read(path)
        return Loaded(path, 0, recipe, tokenizer, _filled(recipe, weights, device))
    found = open_checkpoint(path, warn)
    recipe, tokenizer = documents(found)
    wanted = logical_tensors(huggingface.empty(recipe.model))
    return Loaded(found.path, found.step, recipe, tokenizer, _filled(recipe, found.read("model", wanted), device))


def open_checkpoint(path: Path, warn: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The checkpoint of a run's folder, or of that name, in our layout. Raises CheckpointError when there is none."""
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = None
    if (folder / manifest.NAME).is_file():
        found = checkpoint.Checkpoint.open(folder)
    elif folder.is_dir():
        found = checkpoint.find(folder, warn)
    if found is None:
        hint = on_the_hub(str(path))
        raise CheckpointError(
            f"{path}: no checkpoint there: name a run's folder, or one of its checkpoints/step-*{hint and f'; {hint}'}"
        )
    return found


def on_the_hub(name: str) -> str:
    """What to do if `name` is one on the hub; nothing if it cannot be, or is a folder."""
    if Path(name).exists() or not hub.is_name(name):
        return ""
    return f"if it is a name on the hub, `switchcli convert {name} FOLDER --to switchcli` makes a checkpoint of it"


def documents(found: checkpoint.Checkpoint) -> tuple[PretrainRecipe, Tokenizer]:
    """The recipe and the tokenizer of a checkpoint."""
    recipe = resolve(str(found.path / "recipe.yaml"), [], PretrainRecipe)
    text = found.document("tokenizer.json").decode()
    return recipe, Tokenizer.from_json(text, str(found.path / "tokenizer.json"))


def _filled(recipe: PretrainRecipe, tensors: Mapping[str, torch.Tensor], device: torch.device) -> SwitchTransformer:
    with torch.device("meta"):
        model = SwitchTransformer(recipe.model, recipe.train.router_dtype)
    model = model.to_empty(device=device).eval()
    fill(model, tensors)
    return model
