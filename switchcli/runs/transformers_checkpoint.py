"""A folder in the Hugging Face layout as a checkpoint: recipe, tokenizer and weights."""

from bisect import bisect_left
from pathlib import Path
from typing import NamedTuple

import torch

from switchcli.convert import config as configs
from switchcli.convert.config import Config, StackLengths
from switchcli.convert.tokenizer_files import FILES, find_tokenizer
from switchcli.convert.weight_files import HuggingFaceWeights, open_weights
from switchcli.data.config import DataSpec
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.tokenizer.tokenizer import MAX_BYTES, Tokenizer, TokenizerFile
from switchcli.errors import CheckpointError, DataError
from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe.schema import PretrainRecipe
from switchcli.train.checkpointer import logical_tensors
from switchcli.train.config import TrainSpec
from switchcli.user_files import read_regular


class HuggingFaceCheckpoint(NamedTuple):
    """What such a folder holds."""

    recipe: PretrainRecipe
    """Of it only the model, the lengths and the tokenizer are the folder's."""
    tokenizer: Tokenizer
    weights: HuggingFaceWeights


def read(folder: Path, tokenizer: Path | None = None, *, unpickle: bool = False) -> HuggingFaceCheckpoint:
    """Open the folder; weights are checked by name, shape and type, and read when they are asked for.

    Raises:
        CheckpointError: it is not whole, or no model of ours.
        DataError: no tokenizer in T5's layout: the file `tokenizer`, or the one that belongs to `folder`.
    """
    path = folder / configs.NAME
    config = configs.read_config(path)
    file = tokenizer or find_tokenizer(folder)
    if file is None:
        raise DataError(
            f"{folder}: no tokenizer: neither {' nor '.join(FILES)} is there, nor a tokenizer that its configuration "
            "names: put one of these files there, or give the model's own by `switchcli convert ... --tokenizer FILE`"
        )
    recipe = recipe_from_config(config, path, file)
    found = _tokenizer(file)
    if found.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{file}: ids up to {found.vocab_size - 1}, where the embedding of {path} has {config.vocab_size} rows: "
            "give the tokenizer of these weights by --tokenizer FILE"
        )
    wanted = logical_tensors(meta_model(recipe.model))
    return HuggingFaceCheckpoint(recipe, found, open_weights(folder, config, wanted, unpickle=unpickle))


def recipe_from_config(config: Config, path: Path, tokenizer: Path) -> PretrainRecipe:
    """A recipe for the model of `config`, read from `path`. CheckpointError where our model has its own rules."""
    spans = _spans(config.num_experts)
    return PretrainRecipe(
        description=f"Converted from {path.parent.name}: train and data say nothing of how it was trained",
        model=configs.to_model_spec(config, StackLengths(spans.inputs_length, spans.targets_length), path),
        data=DataSpec(tokenizer=TokenizerFile(path=str(tokenizer.absolute())), objective=spans),
        train=TrainSpec(steps=1, batch_tokens=spans.inputs_length),
    )


def meta_model(spec: ModelSpec) -> SwitchTransformer:
    """A model without memory: names and shapes."""
    with torch.device("meta"):
        return SwitchTransformer(spec)


def _spans(num_experts: int) -> SpanCorruption:
    """Lengths from T5's 512 on: a recipe's sequences hold a token for each expert, which transformers does not ask."""
    lengths = range(512, 513 + 8 * num_experts, 64)  # there are more targets than an eighth of the inputs
    place = bisect_left(lengths, num_experts, key=lambda length: SpanCorruption(inputs_length=length).targets_length)
    return SpanCorruption(inputs_length=lengths[place])


def _tokenizer(file: Path) -> Tokenizer:
    try:
        data = read_regular(file, MAX_BYTES)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}): give the model's tokenizer.json or spiece.model by "
            "--tokenizer FILE"
        ) from error
    return Tokenizer.from_bytes(data, str(file))
