"""Read the weights of a folder in the Hugging Face layout, after a check of all names and shapes.

    config.json
    model.safetensors                                   or shards, listed in model.safetensors.index.json
    pytorch_model.bin, pytorch_model.bin.index.json     the same as pickles, only if the user asks for them

The tensors must be exactly those that config.json implies. float16 and bfloat16 values become float32, which holds them
exactly; NaN and infinity are refused. Links are followed, as the hub's cache consists of links, but an index may name
only files of its own folder.

A pickle is a program. `torch.load(weights_only=True)` runs only the few functions that build tensors, but it has had
security holes. This is therefore the only file that reads pickles, and only those that the user trusts.

Names are the same in versions 4 and 5 of transformers' T5, mT5 and SwitchTransformers, and shapes are equal
on both sides:

    encoder.blocks.1.feed_forward.layer.experts.3.wi    ours, one tensor per dense weight and per expert's weight
    encoder.block.1.layer.1.mlp.experts.expert_3.wi.weight

Version 4 stores the embedding under all three names of `EMBEDDINGS`, and as `lm_head` too if it is tied; version 5
stores only the first.
"""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, final

import torch
from safetensors import SafetensorError
from torch import Tensor

from switchcli.checkpoint.tensor_file import check_finite, open_tensors
from switchcli.convert import config as configs
from switchcli.convert.config import Config, ModelType
from switchcli.errors import CheckpointError
from switchcli.system.user_files import open_regular, read_regular

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDEX: Final = ".index.json"
_MAX_INDEX_BYTES: Final = 1 << 28
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FLOATS: Final = ("F32", "BF16", "F16", "torch.float32", "torch.bfloat16", "torch.float16")
"""Dtypes that float32 holds exactly, as safetensors and torch name them."""
_UNPICKLING_ERRORS: Final = ("UnpicklingError", "KeyError", "IndexError", "TypeError", "AttributeError")
"""Names of exceptions that unpickling raises, also for files that are no pickles."""
_POINTER: Final = b"version https://git-lfs"
_FIX: Final = "take the complete folder as save_pretrained wrote it"

EMBEDDINGS: Final[tuple[str, ...]] = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names of the embedding."""
HEAD: Final[str] = "lm_head.weight"
UNUSED: Final = frozenset({"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"})
"""Tensors in T5's first checkpoints that no version of transformers reads."""

_GATED: Final = {"wi": "wi_1", "wi_gate": "wi_0", "wo": "wo"}  # theirs: gelu(wi_0 x) * (wi_1 x)
_BLOCK: Final = r"(\w+)\.blocks\.(\d+)\."
# Patterns of our names with templates of theirs. LAST is the index of a block's last sublayer, DENSE its module's name.
_TEMPLATES: Final[tuple[tuple[re.Pattern[str], str], ...]] = tuple(
    (re.compile(pattern), template)
    for pattern, template in [
        (r"embedding", EMBEDDINGS[0]),
        (r"head\.weight", HEAD),
        (r"(\w+)\.position_bias\.weight", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        (r"(\w+)\.final_norm\.weight", r"\1.final_layer_norm.weight"),
        (_BLOCK + r"self_attention\.norm\.weight", r"\1.block.\2.layer.0.layer_norm.weight"),
        (_BLOCK + r"self_attention\.attention\.([qkvo])\.weight", r"\1.block.\2.layer.0.SelfAttention.\3.weight"),
        (_BLOCK + r"cross_attention\.norm\.weight", r"\1.block.\2.layer.1.layer_norm.weight"),
        (_BLOCK + r"cross_attention\.attention\.([qkvo])\.weight", r"\1.block.\2.layer.1.EncDecAttention.\3.weight"),
        (_BLOCK + r"feed_forward\.norm\.weight", r"\1.block.\2.layer.LAST.layer_norm.weight"),
        (_BLOCK + r"feed_forward\.layer\.router\.weight", r"\1.block.\2.layer.LAST.mlp.router.classifier.weight"),
        (
            _BLOCK + r"feed_forward\.layer\.experts\.(\d+)\.(wi|wo)",
            r"\1.block.\2.layer.LAST.mlp.experts.expert_\3.\4.weight",
        ),
        (_BLOCK + r"feed_forward\.layer\.(wi|wi_gate|wo)\.weight", r"\1.block.\2.layer.LAST.DENSE.\3.weight"),
    ]
)


def transformers_names(model_type: ModelType, gated: bool) -> Callable[[str], str]:
    """Return the function from the name of one of our tensors to its name in transformers.

    `gated` says whether dense feed-forwards are gated. The model must be one that transformers has (see config.py).
    """
    dense = "mlp" if model_type == "switch_transformers" else "DenseReluDense"

    def their_name(name: str) -> str:
        for pattern, template in _TEMPLATES:
            if match := pattern.fullmatch(name):
                # Encoder: 0 self-attention, 1 feed-forward. Decoder: cross-attention is 1, feed-forward 2.
                last = "1" if name.startswith("encoder.") else "2"
                theirs = match.expand(template).replace("LAST", last)
                if ".DENSE." in theirs:
                    weight = match[3]
                    theirs = theirs.replace(f".DENSE.{weight}.", f".{dense}.{_GATED[weight] if gated else weight}.")
                return theirs
        raise AssertionError(f"{name} has no name in transformers")

    return their_name


class StoredTensor(NamedTuple):
    """A tensor in a file, not yet read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@final
class HuggingFaceWeights(Mapping[str, Tensor]):
    """The tensors of our model under our names, float32, on the CPU. Each access reads and checks a tensor."""

    def __init__(self, stored: Mapping[str, tuple[str, StoredTensor]]) -> None:
        """`stored` gives, for each of our names, the name in transformers and the tensor."""
        self._stored = stored

    @property
    def has_copied_head(self) -> bool:
        """Return whether the matrix of the softmax is a copy of the embedding, to which transformers ties it."""
        return "head.weight" in self._stored and self._stored["head.weight"][0] != HEAD

    def __getitem__(self, name: str) -> Tensor:
        return _read_finite(*self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def is_hugging_face_folder(folder: Path) -> bool:
    """Return whether a folder looks like one in the Hugging Face layout: it has a config.json."""
    return (folder / configs.NAME).is_file()


def open_weights(folder: Path, config: Config, expected: Mapping[str, Tensor], *, unpickle: bool) -> HuggingFaceWeights:
    """Return the weights of `folder` under our names.

    `expected` gives our names and the shapes; its tensors may be on `meta`.

    Raises:
        CheckpointError: a tensor is missing, unknown, in two files, or of another shape or dtype; or a copy of the
            embedding differs from it; or the weights are pickled and `unpickle` is False.
    """
    stored = _stored(folder, unpickle)
    their_name = transformers_names(config.model_type, config.gated)
    embedding = next((name for name in EMBEDDINGS if name in stored), EMBEDDINGS[0])
    names = {name: their_name(name) for name in expected} | {"embedding": embedding}
    copies = [name for name in EMBEDDINGS if name in stored and name != embedding]
    if "head.weight" not in expected:
        copies += [HEAD] if HEAD in stored else []
    elif config.tie_word_embeddings and HEAD not in stored:
        # T5 1.1 and mT5 of transformers 5: the matrices are tied, but decoder outputs are not scaled as with tied ones.
        names["head.weight"] = embedding
    for name, theirs in names.items():
        _check(folder, stored, theirs, tuple(expected[name].shape))
    for copy in copies:
        _check(folder, stored, copy, tuple(expected["embedding"].shape))
    if unknown := sorted(stored.keys() - {*names.values(), *copies} - UNUSED):
        raise CheckpointError(
            f"{stored[unknown[0]].path}: {unknown[0]}: the model of {configs.NAME} has no such tensor: does that file "
            "belong to these weights?"
        )
    for copy in copies:
        if not torch.equal(_read_finite(embedding, stored[embedding]), _read_finite(copy, stored[copy])):
            raise CheckpointError(
                f"{stored[copy].path}: {copy} is not {embedding}, and switchcli has one matrix for both: it cannot "
                "compute what these weights do"
            )
    return HuggingFaceWeights({name: (theirs, stored[theirs]) for name, theirs in names.items()})


def _check(folder: Path, stored: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless the tensor exists with that shape and a dtype that float32 holds exactly."""
    if name not in stored:
        raise CheckpointError(f"{folder}: {name}: missing, and {configs.NAME} wants it, {list(shape)}: {_FIX}")
    tensor = stored[name]
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.path}: {name}: {list(tensor.shape)}, and {configs.NAME} wants {list(shape)}: {_FIX}"
        )
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(
            f"{tensor.path}: {name}: of type {tensor.dtype}, where float32, bfloat16 and float16 are read: save it as "
            "one of them"
        )


def _read_finite(name: str, stored: StoredTensor) -> Tensor:
    """Return the values of a tensor in float32. Raises SavedNumericsError for NaN and infinity."""
    try:
        tensor = stored.read().float()
    except SafetensorError as error:
        raise CheckpointError(f"{stored.path}: {name}: {error}: {_FIX}") from error
    return check_finite(tensor, name, stored.path)


def _stored(folder: Path, unpickle: bool) -> dict[str, StoredTensor]:
    """Return every tensor of the folder by its name. safetensors take precedence over pickles, as in transformers."""
    for name, read in ((SAFE, _read_safetensors), (PICKLED, _read_pickle)):
        single_file, index = folder / name, folder / f"{name}{INDEX}"
        if not single_file.is_file() and not index.is_file():
            continue
        if name == PICKLED and not unpickle:
            raise CheckpointError(
                f"{folder}: its weights are a pickle ({name}), which can run code when it is read: if you trust its "
                f"author, `switchcli convert {folder} DESTINATION --to switchcli --unpickle` makes safetensors of it"
            )
        return read(single_file) if single_file.is_file() else _read_shards(folder, index, read)
    raise CheckpointError(f"{folder}: no {SAFE} beside {configs.NAME}: {_FIX}")


def _check_downloaded(path: Path, file: BinaryIO) -> None:
    """Raise CheckpointError if the file is the pointer that git leaves in place of a large file."""
    if os.pread(file.fileno(), len(_POINTER), 0) == _POINTER:
        raise CheckpointError(f"{path}: a pointer of git-lfs, not the weights: run `git lfs pull` in that folder")


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, which stays open."""
    tensors = {}
    try:
        with open_regular(path) as file:
            _check_downloaded(path, file)
            stream = open_tensors(file)
        for name in stream.keys():  # noqa: SIM118 (not a mapping)
            header = stream.get_slice(name)
            read = partial(stream.get_tensor, name)
            tensors[name] = StoredTensor(path, header.get_dtype(), tuple(header.get_shape()), read)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}): copy it again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}): {_FIX}") from error
    return tensors


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a pickled state dict.

    The tensors of a zip file, which torch writes since 1.6, stay on disk until used.

    Raises:
        CheckpointError: the file holds other objects, or it is damaged.
    """
    try:
        with warnings.catch_warnings(), open_regular(path) as file:
            warnings.simplefilter("ignore")  # torch's remarks on the format are for programmers
            _check_downloaded(path, file)
            opened = f"/dev/fd/{file.fileno()}"  # torch maps only files that it opens itself
            state = torch.load(  # noqa: TID251 - the user asks for it
                opened, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(opened)
            )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}): {_FIX}") from error
    except Exception as error:
        # UnpicklingError is known by its name, for this package never imports the module pickle.
        if isinstance(error, RuntimeError | ValueError | EOFError) or (type(error).__name__ in _UNPICKLING_ERRORS):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if type(error).__name__ == "UnpicklingError":  # torch's own text advises to load the file unsafely
                reason = "it holds other objects, or is damaged"
            raise CheckpointError(f"{path}: not a file of tensors alone ({reason}): take a safetensors file") from error
        raise
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: not names with tensors: take a file that save_pretrained wrote")
    return {
        str(name): StoredTensor(path, str(tensor.dtype), tuple(tensor.shape), tensor.detach)
        for name, tensor in state.items()
    }


def _read_shards(folder: Path, index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Return the tensors of all files in an index. Each must be in the file that the index names, and in no other."""
    files = _read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(files.values()):
        for name, tensor in read(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: {name}: in {file} and in {tensors[name].path.name}: {_FIX}")
            tensors[name] = tensor
    for name, file in files.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{index}: says that {file} holds {name}, which it does not: {_FIX}")
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """Return the file of each tensor in an index, by the tensor's name. It lies in the folder of the index."""
    try:
        files = dict(json.loads(read_regular(index, _MAX_INDEX_BYTES))["weight_map"].items())
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}): {_FIX}") from error
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of tensors (weight_map): {_FIX}") from error
    for file in files.values():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: names {file!r}, which is no file of its folder: do not use these weights")
    return files
