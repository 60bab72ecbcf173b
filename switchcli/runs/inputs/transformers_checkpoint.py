"""Open a folder in the Hugging Face layout as a checkpoint: its recipe, tokenizer and weights."""

from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import torch

from switchcli.convert import config as configs
from switchcli.convert.config import Config, StackLengths
from switchcli.convert.tokenizer_files import FILES, find_tokenizer
from switchcli.convert.unread import differences
from switchcli.convert.weight_files import HuggingFaceWeights, open_weights
from switchcli.data.config import DataSpec
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.tokenizer.tokenizer import MAX_BYTES, Tokenizer, TokenizerFile
from switchcli.errors import CheckpointError, DataError
from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import PretrainRecipe
from switchcli.system.user_files import read_regular
from switchcli.training.checkpointer import logical_tensors
from switchcli.training.config import TrainSpec


class HuggingFaceCheckpoint(NamedTuple):
    """The contents of a folder in the Hugging Face layout."""

    recipe: PretrainRecipe
    """A recipe for the model. Only its model, lengths and tokenizer come from the folder; the rest are defaults."""
    tokenizer: Tokenizer
    weights: HuggingFaceWeights
    warnings: list[str]
    """What the folder states and is not read, or computed in another way."""


def read(folder: Path, tokenizer: Path | None = None, *, unpickle: bool = False) -> HuggingFaceCheckpoint:
    """Open the folder. Names, shapes and dtypes of the weights are checked; the weights are read on demand.

    `tokenizer` is the file to read instead of the folder's own. `unpickle` allows weights in a pickle.

    Raises:
        CheckpointError: the folder is incomplete, or its model is not supported.
        DataError: there is no tokenizer, or it is not in T5's layout.
    """
    path = folder / configs.NAME
    config = configs.read_config(path)
    file = tokenizer or find_tokenizer(folder)
    if file is None:
        raise DataError(
            f"{folder}: no tokenizer: neither {' nor '.join(FILES)} is there, nor does its configuration name one in "
            "this folder or a repository in the hub's cache: put one of these files there, or give the model's own by "
            "`switchcli convert ... --tokenizer FILE`"
        )
    recipe = recipe_from_config(config, path, file)
    loaded_tokenizer = _read_tokenizer(file)
    max_id = loaded_tokenizer.vocab_size - 1
    if max_id >= config.vocab_size:
        raise CheckpointError(
            f"{file}: ids up to {max_id}, where the embedding of {path} has {config.vocab_size} rows: "
            "give the tokenizer of these weights by --tokenizer FILE"
        )
    expected = logical_tensors(meta_model(recipe.model))
    weights = open_weights(folder, config, expected, unpickle=unpickle)
    return HuggingFaceCheckpoint(
        recipe, loaded_tokenizer, weights, [*differences(folder, weights, file, loaded_tokenizer)]
    )


def recipe_from_config(config: Config, path: Path, tokenizer: Path) -> PretrainRecipe:
    """Return a recipe for the model of `config`, which was read from `path`.

    Raises:
        CheckpointError: the model breaks a rule of ours.
    """
    spans = _span_corruption(config.num_experts)
    return PretrainRecipe(
        description=f"Converted from {path.parent.name}: train and data say nothing of how it was trained",
        model=configs.to_model_spec(config, StackLengths(spans.inputs_length, spans.targets_length), path),
        data=DataSpec(tokenizer=TokenizerFile(path=str(tokenizer.absolute())), objective=spans),
        train=TrainSpec(steps=1, batch_tokens=spans.inputs_length),
    )


def meta_model(spec: ModelSpec) -> SwitchTransformer:
    """Return the model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return SwitchTransformer(spec)


def _span_corruption(num_experts: int) -> SpanCorruption:
    """Return the objective with the shortest inputs, at least T5's 512, whose targets have a token for each expert.

    That is a rule of our recipes; transformers has none.
    """
    # Targets are longer than an eighth of the inputs, so inputs of 8 * num_experts are long enough. Targets grow with
    # inputs, so the shortest length is found by bisection.
    lengths = range(512, 513 + 8 * num_experts, 64)
    index = bisect_left(lengths, num_experts, key=lambda length: SpanCorruption(inputs_length=length).targets_length)
    return SpanCorruption(inputs_length=lengths[index])


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        data = read_regular(file, MAX_BYTES)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}): give the model's tokenizer.json or spiece.model by "
            "--tokenizer FILE"
        ) from error
    return Tokenizer.from_bytes(data, str(file))
