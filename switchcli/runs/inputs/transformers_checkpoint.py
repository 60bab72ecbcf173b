"""Open a folder in the Hugging Face layout as a checkpoint: its model, tokenizer and weights."""

from pathlib import Path
from typing import NamedTuple

from switchcli.checkpoint.documents import ModelFile
from switchcli.checkpoint.model_weights import logical_tensors, meta_model
from switchcli.convert import config as configs
from switchcli.convert.config import StackLengths
from switchcli.convert.tokenizer_files import FILES, find_tokenizer
from switchcli.convert.unread import differences
from switchcli.convert.weight_files import HuggingFaceWeights, open_weights
from switchcli.data.tokenizer.tokenizer import MAX_BYTES, Tokenizer
from switchcli.errors import CheckpointError, DataError
from switchcli.system.user_files import read_regular

INPUTS_LENGTH, TARGETS_LENGTH = 512, 114
"""The lengths of T5's pre-training, which the layout does not say."""


class HuggingFaceCheckpoint(NamedTuple):
    """The contents of a folder in the Hugging Face layout."""

    model_file: ModelFile
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
    model = configs.to_model_spec(config, StackLengths(INPUTS_LENGTH, TARGETS_LENGTH), path)
    loaded_tokenizer = _read_tokenizer(file)
    max_id = loaded_tokenizer.vocab_size - 1
    if max_id >= config.vocab_size:
        raise CheckpointError(
            f"{file}: ids up to {max_id}, where the embedding of {path} has {config.vocab_size} rows: "
            "give the tokenizer of these weights by --tokenizer FILE"
        )
    expected = logical_tensors(meta_model(model))
    weights = open_weights(folder, config, expected, unpickle=unpickle)
    return HuggingFaceCheckpoint(
        ModelFile(model=model, inputs_length=INPUTS_LENGTH, targets_length=TARGETS_LENGTH),
        loaded_tokenizer,
        weights,
        [*differences(folder, weights, file, loaded_tokenizer)],
    )


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        data = read_regular(file, MAX_BYTES)
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}): give the model's tokenizer.json or spiece.model by "
            "--tokenizer FILE"
        ) from error
    return Tokenizer.from_bytes(data, str(file))
