"""safetensors files: cut to a bounded size, and judged by the header before tensors are read.

The library does the work, and refuses overlapping, missing and trailing bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, final

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Kind(NamedTuple):
    """What a tensor is before its values: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def kind_of(tensor: Tensor) -> Kind:
    """The kind of a tensor on any device, `meta` too."""
    return Kind(tensor.dtype, tuple(tensor.shape))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the values of these tensors take on disk; headers are some hundred bytes a tensor more."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(named: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file with these tensors, of any device and stride. Takes their size in memory twice."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, metadata
    )


def read_kinds(path: Path) -> dict[str, Kind]:
    """Name and kind of each tensor of a file, from its header alone. Raises ValueError when the file is not sound."""
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


@final
class Tensors(Mapping[str, Tensor]):
    """Tensors in files: each is read whenever it is asked for, into memory of its own on the CPU, and none is kept."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        """`places` gives the file of each name."""
        self._places = places
        self._open: tuple[Path, safe_open] | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file(name).get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.clone()

    def part(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """What lies there of a tensor; no more of it is read."""
        if not index:
            return self[name]
        part: Tensor = self._file(name).get_slice(name)[index]  # type: ignore[no-untyped-call]
        return part.clone()

    def _file(self, name: str) -> safe_open:
        path = self._places[name]
        if self._open is None or self._open[0] != path:
            self._open = path, safe_open(path, framework="pt")
        return self._open[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def shards(named: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors in the order given, in runs of at most max_bytes; a larger tensor is alone."""
    shard: dict[str, Tensor] = {}
    room = max_bytes
    for name, tensor in named.items():
        size = num_bytes([tensor])
        if shard and size > room:
            yield shard
            shard, room = {}, max_bytes
        shard[name] = tensor
        room -= size
    if shard:
        yield shard
