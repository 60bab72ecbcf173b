"""safetensors files: written as a stream without a second copy in memory, judged by the header before tensors are read.

Writing is here because the library's own writer holds the whole file in memory or opens it by itself; a test reads with
the library what is written here. Reading is the library's, which refuses overlapping, missing and trailing bytes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
MAX_HEADER_BYTES: Final = 1 << 24


class Kind(NamedTuple):
    """What a tensor is before its values: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def kind_of(tensor: Tensor) -> Kind:
    """The kind of a tensor on any device, `meta` too."""
    return Kind(tensor.dtype, tuple(tensor.shape))


def num_bytes(named: Mapping[str, Tensor]) -> int:
    """Bytes that the values of these tensors take on disk; headers are some hundred bytes a tensor more."""
    return sum(tensor.numel() * tensor.element_size() for tensor in named.values())


def encode(named: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file with these tensors, of any device and stride, in pieces."""
    # Wide dtypes first: each tensor then starts at a multiple of its own item size.
    ordered = sorted(named.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= MAX_HEADER_BYTES
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield from _bytes(tensor)


def _bytes(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def read_kinds(path: Path) -> dict[str, Kind]:
    """Name and kind of each tensor of a file, from its header alone. Raises ValueError when the file is not sound."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length:,} bytes, where {MAX_HEADER_BYTES:,} are allowed")
    kinds: dict[str, Kind] = {}
    try:
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                header = stream.get_slice(name)
                kinds[name] = Kind(_DTYPES[header.get_dtype()], tuple(header.get_shape()))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except KeyError as error:
        raise ValueError(f"a tensor of type {error}") from error
    return kinds


def read(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names, in memory of their own on the CPU."""
    with safe_open(path, framework="pt") as stream:
        return {name: stream.get_tensor(name).clone() for name in names}


def shards(named: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in the order given, in runs of at most max_bytes; a larger tensor is alone."""
    shard: dict[str, Tensor] = {}
    room = max_bytes
    for name, tensor in named.items():
        size = num_bytes({name: tensor})
        if shard and size > room:
            yield shard
            shard, room = {}, max_bytes
        shard[name] = tensor
        room -= size
    if shard:
        yield shard
