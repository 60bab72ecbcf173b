"""The weights of a folder in the Hugging Face layout, checked by name and shape before any is read.

    config.json
    model.safetensors                                   or in shards, listed in model.safetensors.index.json
    pytorch_model.bin, pytorch_model.bin.index.json     the same as pickles (see `pickled`), when the user asks for them

What is there must be exactly what config.json wants. Values are taken as they are, float16 and bfloat16 as float32,
which holds them exactly; one that is no finite number is refused. The hub's cache is made of links: they are followed,
but an index names files of its own folder only.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from switchcli.convert import config as configs
from switchcli.convert import pickled
from switchcli.convert.config import Config
from switchcli.convert.weight_names import EMBEDDINGS, HEAD, UNUSED, transformers_names
from switchcli.errors import CheckpointError
from switchcli.user_files import read_regular

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX: Final = ".index.json"
_MAX_INDEX_BYTES: Final = 1 << 28
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_EXACT: Final = ("F32", "BF16", "F16", "torch.float32", "torch.bfloat16", "torch.float16")
"""The types that float32 holds exactly, by safetensors' names and torch's."""
_WHOLE: Final = "take the whole folder as save_pretrained wrote it"


class StoredTensor(NamedTuple):
    """A tensor of a file, not yet read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@final
class HuggingFaceWeights(Mapping[str, Tensor]):
    """Our model's tensors under our names, float32, on the CPU; each is read, and checked, whenever it is asked for."""

    def __init__(self, places: Mapping[str, tuple[str, StoredTensor]]) -> None:
        """`places` holds, by our name, theirs and where the tensor is."""
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        theirs, place = self._places[name]
        return _finite(theirs, place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def is_hugging_face_folder(folder: Path) -> bool:
    """Whether a folder claims to be in this layout."""
    return (folder / configs.NAME).is_file()


def open_weights(folder: Path, config: Config, wanted: Mapping[str, Tensor], *, unpickle: bool) -> HuggingFaceWeights:
    """The tensors of `folder` under our names, which `wanted` gives with their shapes (tensors on `meta` will do).

    Raises:
        CheckpointError: a tensor is missing, unknown, in two files, of another shape or type, or a copy of the
            embedding is none; or the weights are pickled and `unpickle` is False.
    """
    stored = _stored(folder, unpickle)
    their_name = transformers_names(config.model_type, config.gated)
    embedding = next((name for name in EMBEDDINGS if name in stored), EMBEDDINGS[0])
    names = {name: their_name(name) for name in wanted} | {"embedding": embedding}
    copies = [name for name in EMBEDDINGS if name in stored and name != embedding]
    if "head.weight" not in wanted:
        copies += [HEAD] if HEAD in stored else []
    elif config.tie_word_embeddings and HEAD not in stored:  # version 5's T5: tied, and yet not scaled
        names["head.weight"] = embedding
    for name, theirs in names.items():
        _check(folder, stored, theirs, tuple(wanted[name].shape))
    for copy in copies:
        _check(folder, stored, copy, tuple(wanted["embedding"].shape))
    if unknown := sorted(stored.keys() - {*names.values(), *copies} - UNUSED):
        raise CheckpointError(
            f"{stored[unknown[0]].path}: {unknown[0]}: {configs.NAME} has no place for it: is it that of these weights?"
        )
    for copy in copies:
        if not torch.equal(_finite(embedding, stored[embedding]), _finite(copy, stored[copy])):
            raise CheckpointError(
                f"{stored[copy].path}: {copy} is not {embedding}, and switchcli has one matrix for both: it cannot "
                "compute what these weights do"
            )
    return HuggingFaceWeights({name: (theirs, stored[theirs]) for name, theirs in names.items()})


def _check(folder: Path, stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless a tensor is there with that shape, and of a type that float32 holds."""
    if name not in stored:
        raise CheckpointError(f"{folder}: {name}: not there, and {configs.NAME} wants it, {list(shape)}: {_WHOLE}")
    place = stored[name]
    if place.shape != shape:
        raise CheckpointError(
            f"{place.path}: {name}: {list(place.shape)}, and {configs.NAME} wants {list(shape)}: {_WHOLE}"
        )
    if place.dtype not in _EXACT:
        raise CheckpointError(
            f"{place.path}: {name}: of type {place.dtype}, where float32, bfloat16 and float16 are read: save it as one"
        )


def _finite(name: str, place: StoredTensor) -> Tensor:
    try:
        tensor = place.read().float()
    except SafetensorError as error:
        raise CheckpointError(f"{place.path}: {name}: {error}: {_WHOLE}") from error
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{place.path}: {name}: holds NaN or infinity: take a checkpoint from before it diverged")
    return tensor


def _stored(folder: Path, unpickle: bool) -> dict[str, StoredTensor]:
    """Every tensor of the folder by its name; safetensors come first, as with transformers."""
    for name, read in ((SAFE, _safe), (PICKLED, _pickled)):
        whole, index = folder / name, folder / f"{name}{INDEX}"
        if not whole.is_file() and not index.is_file():
            continue
        if name == PICKLED and not unpickle:
            raise CheckpointError(
                f"{folder}: its weights are a pickle ({name}), which can run code when it is read: if you trust its "
                f"maker, `switchcli convert {folder} DESTINATION --to switchcli --unpickle` makes safetensors of it"
            )
        return read(whole) if whole.is_file() else _shards(folder, index, read)
    raise CheckpointError(f"{folder}: no {SAFE} beside {configs.NAME}: {_WHOLE}")


def _safe(path: Path) -> dict[str, StoredTensor]:
    try:
        stream: Any = safe_open(path, framework="pt")  # left open: its tensors are read when they are asked for
        found = {}
        for name in stream.keys():  # noqa: SIM118 (not a mapping)
            header = stream.get_slice(name)
            read = partial(stream.get_tensor, name)
            found[name] = StoredTensor(path, header.get_dtype(), tuple(header.get_shape()), read)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}): copy it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}): {_WHOLE}") from error
    return found


def _pickled(path: Path) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(path, str(tensor.dtype), tuple(tensor.shape), tensor.detach)
        for name, tensor in pickled.read(path).items()
    }


def _shards(folder: Path, index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all files that an index names, each in the file that it says."""
    try:
        files = json.loads(read_regular(index, _MAX_INDEX_BYTES))["weight_map"]
        pairs = list(files.items())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}): {_WHOLE}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of tensors (weight_map): {_WHOLE}") from error
    found: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(file for _, file in pairs):
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: names {file!r}, which is no file of its folder: do not use these weights")
        for name, place in read(folder / file).items():
            if name in found:
                raise CheckpointError(f"{folder}: {name}: in {file} and in {found[name].path.name}: {_WHOLE}")
            found[name] = place
    for name, file in pairs:
        if name not in found or found[name].path.name != file:
            raise CheckpointError(f"{index}: says that {file} holds {name}, which it does not: {_WHOLE}")
    return found
