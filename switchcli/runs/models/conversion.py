"""Convert a checkpoint to or from another layout. The destination is written completely or not at all."""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from switchcli.checkpoint import tensor_file
from switchcli.checkpoint.model_weights import logical_tensors, meta_model
from switchcli.convert import config as configs
from switchcli.convert import hub, tokenizer_files
from switchcli.convert.config import StackLengths
from switchcli.convert.to_transformers import rename_tensors, transformers_config
from switchcli.convert.weight_files import INDEX, SAFE, is_hugging_face_folder
from switchcli.data.tokenizer.train import sentinel
from switchcli.errors import CheckpointError
from switchcli.model.config import router_dtype
from switchcli.runs.inputs.loading import of_another_kind, open_model, read_hugging_face
from switchcli.runs.inputs.new_folder import (
    check_checkpoint_destination,
    check_destination,
    publish_checkpoint,
    publish_new_folder,
)
from switchcli.runs.models import model_card
from switchcli.system import publish
from switchcli.terminal.console import Console

_MAX_FILE_BYTES = 1 << 31


def to_switchcli(
    source: str, destination: Path, console: Console, *, tokenizer: Path | None, revision: str, unpickle: bool
) -> dict[str, Any]:
    """Write a Hugging Face folder, or a repository of the hub, as one of our checkpoints. Return the JSON result.

    A warning names each thing that the folder states and that is not read, or is computed in another way.
    `tokenizer` is the file to read if the source has none. `revision` is a commit, tag or branch on the hub. `unpickle`
    allows weights in a pickle.

    Raises:
        CheckpointError: the source is incomplete or not a supported model, or the disk cannot be written.
        DataError: there is no tokenizer.
    """
    folder = Path(source)
    if not folder.exists() and hub.is_repository_id(source):
        folder = hub.download(source, revision, unpickle=unpickle)
    if not is_hugging_face_folder(folder):
        fix = of_another_kind(folder) or "name a folder in the Hugging Face layout"
        raise CheckpointError(f"{source}: no {configs.NAME} there: {fix}")
    destination = check_checkpoint_destination(folder, destination)
    converted = read_hugging_face(folder, tokenizer, unpickle=unpickle)
    for warning in converted.warnings:
        console.warning(warning)
    parameters = publish_checkpoint(destination, converted.model_file, converted.tokenizer, converted.weights)
    return _result(source, destination, "switchcli", parameters, converted.warnings)


def to_huggingface(source: Path, destination: Path, console: Console, license_: str | None = None) -> dict[str, Any]:
    """Write one of our checkpoints so that transformers' `from_pretrained` reads it. Return the JSON result.

    A warning names each property of the model that the Hugging Face layout cannot express. `license_` is the identifier
    of a license for the model card.

    Raises:
        CheckpointError: transformers has no such model, no checkpoint is complete, or the disk cannot be written.
    """
    if is_hugging_face_folder(source):
        raise CheckpointError(f"{source}: in the Hugging Face layout already: convert it --to switchcli, or copy it")
    checkpoint = open_model(source, console)
    destination = check_destination(source, destination)
    spec, file = checkpoint.spec, checkpoint.model_file
    lengths = StackLengths(file.inputs_length, file.targets_length)
    config, warnings = transformers_config(spec, lengths, checkpoint.path, router_dtype(file.precision))
    for warning in warnings:
        console.warning(warning)
    tensors = logical_tensors(meta_model(spec))
    parameters = sum(tensor.numel() for tensor in tensors.values())
    tokenizer = checkpoint.tokenizer
    sentinels = [sentinel(number) for number in range(len(tokenizer.sentinels))]
    documents = {
        configs.NAME: configs.config_json(config),
        "generation_config.json": configs.generation_config_json(),
        **tokenizer_files.tokenizer_documents(tokenizer.to_json(), sentinels, file.inputs_length),
        model_card.NAME: model_card.model_card(checkpoint, parameters, destination.name, license_, warnings),
    }

    def write(temporary: Path) -> Path:
        new = temporary / "new"
        publish.make_folder(new)
        weight_files = _weight_files(rename_tensors(config, checkpoint.weights()))
        for name, content in chain(documents.items(), weight_files):
            publish.write_new(new / name, content)
            del content  # frees its memory before the next file is encoded
        return new

    publish_new_folder(destination, tensor_file.num_bytes(tensors.values()), write)
    return _result(str(source), destination, "huggingface", parameters, warnings)


def _weight_files(tensors: Mapping[str, Tensor]) -> Iterable[tuple[str, bytes | memoryview]]:
    """Yield name and content of each file of weights. If there are several, yield their index first.

    Each file is encoded when it is asked for, and its tensors are then dropped. To save memory, the caller must not
    hold a reference to `tensors`.
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
        # transformers 4 refuses a file without this format.
        yield name, tensor_file.encode(shards.pop(0), {"format": "pt"})


def _result(source: str, destination: Path, to: str, parameters: int, warnings: list[str]) -> dict[str, Any]:
    return {
        "source": source,
        "destination": str(destination),
        "to": to,
        "parameters": parameters,
        "warnings": warnings,
    }
