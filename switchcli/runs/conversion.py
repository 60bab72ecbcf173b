"""Convert a checkpoint to or from the Hugging Face layout. The destination is written completely or not at all."""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from switchcli.checkpoint import tensor_file
from switchcli.checkpoint.fsops import DISK
from switchcli.convert import config as configs
from switchcli.convert import hub, tokenizer_files
from switchcli.convert.config import StackLengths
from switchcli.convert.to_transformers import rename_tensors, transformers_config
from switchcli.convert.weight_files import INDEX, SAFE, is_hugging_face_folder
from switchcli.data.tokenizer.train import sentinel
from switchcli.errors import CheckpointError
from switchcli.report.console import Console
from switchcli.runs import transformers_checkpoint
from switchcli.runs.loading import open_model
from switchcli.runs.new_folder import (
    check_checkpoint_destination,
    check_destination,
    publish_checkpoint,
    publish_new_folder,
)
from switchcli.train.checkpointer import logical_tensors

_MAX_FILE_BYTES = 1 << 31


def to_switchcli(
    source: str, destination: Path, *, tokenizer: Path | None, revision: str, unpickle: bool
) -> dict[str, Any]:
    """Write a Hugging Face folder, or a repository of the hub, as one of our checkpoints; return its description.

    `tokenizer` is read if the source has none, `revision` is a commit, tag or branch of the hub, and `unpickle` allows
    weights that are a pickle.

    Raises:
        CheckpointError: it is no whole model of ours, or the disk refuses.
        DataError: no tokenizer.
    """
    folder = Path(source)
    if not folder.exists() and hub.is_repository_id(source):
        folder = hub.download(source, revision, unpickle=unpickle)
    if not is_hugging_face_folder(folder):
        raise CheckpointError(f"{source}: no {configs.NAME} there: name a folder in the Hugging Face layout")
    destination = check_checkpoint_destination(folder, destination)
    recipe, found, weights = transformers_checkpoint.read(folder, tokenizer, unpickle=unpickle)
    return _result(source, destination, "switchcli", publish_checkpoint(destination, recipe, found, weights), [])


def to_huggingface(source: Path, destination: Path, console: Console) -> dict[str, Any]:
    """Write one of our checkpoints so that transformers' `from_pretrained` reads it; return its description.

    A warning names each property of the model that the format cannot hold.

    Raises:
        CheckpointError: transformers has no such model, there is no whole checkpoint, or the disk refuses.
    """
    if is_hugging_face_folder(source):
        raise CheckpointError(f"{source}: in the Hugging Face layout already: convert it --to switchcli, or copy it")
    opened = open_model(source, console)
    destination, recipe, tokenizer = check_destination(source, destination), opened.recipe, opened.tokenizer
    lengths = StackLengths(recipe.inputs_length, recipe.targets_length)
    config, losses = transformers_config(recipe.model, lengths, opened.path, recipe.train.router_dtype)
    for loss in losses:
        console.warning(loss)
    wanted = logical_tensors(transformers_checkpoint.meta_model(recipe.model))
    small = {
        configs.NAME: configs.config_json(config),
        "generation_config.json": configs.generation_config_json(),
        **tokenizer_files.tokenizer_documents(
            tokenizer.to_json(), [sentinel(number) for number in range(len(tokenizer.sentinels))], recipe.inputs_length
        ),
    }

    def write(temporary: Path) -> Path:
        new = temporary / "new"
        DISK.make_dir(new)
        shards = _shards(rename_tensors(config, opened.weights()))
        for name, content in chain(small.items(), shards):
            DISK.write(new / name, content)
            DISK.sync(new / name)
            del content  # before the next is encoded
        DISK.sync(new)
        return new

    publish_new_folder(destination, tensor_file.num_bytes(wanted.values()), write)
    parameters = sum(tensor.numel() for tensor in wanted.values())
    return _result(str(source), destination, "huggingface", parameters, losses)


def _shards(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, bytes | memoryview]]:
    """Name and content of each file of weights, and of their index when there are several.

    One is encoded at a time, and its tensors let go: `tensors` should be held by nobody else.
    """
    shards = list(tensor_file.group_by_bytes(tensors, _MAX_FILE_BYTES))
    stem, suffix = SAFE.split(".")
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SAFE]
    else:
        files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": tensor_file.num_bytes(tensors.values())}, "weight_map": files}
        yield f"{SAFE}{INDEX}", (json.dumps(index, indent=2) + "\n").encode()
    del tensors
    for name in names:
        yield name, tensor_file.encode(shards.pop(0), {"format": "pt"})  # version 4 reads no file that does not say so


def _result(source: str, destination: Path, to: str, parameters: int, losses: list[str]) -> dict[str, Any]:
    return {
        "source": source,
        "destination": str(destination),
        "to": to,
        "parameters": parameters,
        "warnings": losses,
    }
