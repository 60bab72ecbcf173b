"""safetensors files: cut to a bounded size, and judged by the header before tensors are read.

The library reads them, and refuses overlapping, missing and trailing bytes.
"""

import json
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES: Final = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""In the order in which the library puts them into a file: each tensor then lies at a multiple of its items' size."""


class TensorSpec(NamedTuple):
    """What a tensor is before its values: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def tensor_spec(tensor: Tensor) -> TensorSpec:
    """The kind of a tensor on any device, `meta` too."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the values of these tensors take on disk; headers are some hundred bytes a tensor more."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(named: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> memoryview:
    """Return the bytes of a safetensors file with these tensors, of any device and stride, copied once.

    They are the bytes that the library makes (0.8.0). Its `save` copies twice and blocks every thread meanwhile. Its
    `save_file` copies nothing, but the digest of the manifest is of the bytes in memory, which it does not give. It
    also writes a file that only its owner may read, and its errors have no errno, by which a full disk is known.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    order = list(codes)
    tensors = sorted(named.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    ends = [0]
    for name, tensor in tensors:
        ends.append(ends[-1] + num_bytes([tensor]))
        header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": ends[-2:]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    content = torch.empty(len(head) + ends[-1], dtype=torch.uint8)
    content[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for (_, tensor), begin, end in zip(tensors, ends, ends[1:], strict=False):
        place = content[len(head) + begin : len(head) + end]
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return content.numpy().data


def read_tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Name and kind of each tensor of a file, from its header alone. Raises ValueError when the file is not sound."""
    kinds: dict[str, TensorSpec] = {}
    held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # it may be removed between the library's two ways to open it
    try:
        with safe_open(f"/dev/fd/{held}", framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                header = stream.get_slice(name)
                kinds[name] = TensorSpec(_DTYPES[header.get_dtype()], tuple(header.get_shape()))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except KeyError as error:
        raise ValueError(f"a tensor of type {error}") from error
    finally:
        os.close(held)
    return kinds


@final
class LazyTensors(Mapping[str, Tensor]):
    """Tensors in files, which may be removed meanwhile: each is read whenever it is asked for, into memory of its own
    on the CPU, and none is kept."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        """`places` gives the file of each name."""
        self._places = places
        self._held: dict[Path, int] = {}
        for path in {*places.values()}:
            self._held[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._held[path])
        self._open: tuple[int, safe_open] | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file(name).get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.clone()

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """What lies there of a tensor; no more of it is read."""
        if not index:
            return self[name]
        part: Tensor = self._file(name).get_slice(name)[index]  # type: ignore[no-untyped-call]
        return part.clone()

    def _file(self, name: str) -> safe_open:
        held = self._held[self._places[name]]
        if self._open is None or self._open[0] != held:
            self._open = held, safe_open(f"/dev/fd/{held}", framework="pt")
        return self._open[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def group_by_bytes(named: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
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
