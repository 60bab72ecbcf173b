"""safetensors files: written in shards of bounded size, and checked by their headers before tensors are read.

The safetensors library reads the files, and refuses overlapping, missing and trailing bytes.
"""

import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from switchcli.errors import SavedNumericsError
from switchcli.system.user_files import open_regular

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
"""Dtypes by their codes, in the order of tensors in a file: largest items first, so that every tensor is aligned."""


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def tensor_spec(tensor: Tensor) -> TensorSpec:
    """Return dtype and shape of a tensor on any device, including `meta`."""
    return TensorSpec(tensor.dtype, tuple(tensor.shape))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the values of these tensors on disk. Headers add about a hundred bytes per tensor."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def encode(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> memoryview:
    """Return the bytes of a safetensors file with these tensors, of any device and stride, copied once.

    The bytes equal those of the safetensors library (0.8.0). Its `save` copies twice and blocks all threads meanwhile.
    Its `save_file` copies nothing, but the digest in the manifest needs the bytes in memory; it also makes a file that
    only its owner may read, and its errors have no errno, which is needed to recognize a full disk.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    order = list(codes)
    items = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    # Tensor i occupies bytes offsets[i] to offsets[i + 1], counted from the end of the header.
    offsets = [0]
    for name, tensor in items:
        offsets.append(offsets[-1] + num_bytes([tensor]))
        header[name] = {"dtype": codes[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets[-2:]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # to a multiple of 8 bytes, which aligns the tensors
    head = len(text).to_bytes(8, "little") + text
    content = torch.empty(len(head) + offsets[-1], dtype=torch.uint8)
    content[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for (_, tensor), begin, end in zip(items, offsets, offsets[1:], strict=False):
        destination = content[len(head) + begin : len(head) + end]
        destination.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
    return content.numpy().data


def read_tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Return dtype and shape of each tensor of a file by its name, from the header alone.

    Raises ValueError if the file is invalid.
    """
    specs: dict[str, TensorSpec] = {}
    try:
        with open_regular(path, follow_links=False) as file, open_tensors(file) as stream:
            for name in stream.keys():  # noqa: SIM118 (not a mapping)
                header = stream.get_slice(name)
                specs[name] = TensorSpec(_DTYPES[header.get_dtype()], tuple(header.get_shape()))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except KeyError as error:
        raise ValueError(f"a tensor of type {error}") from error
    return specs


def open_tensors(file: BinaryIO) -> Any:
    """Return a `safe_open` of an open file, which may be closed then.

    The library opens a path twice. Another process may remove or replace the file in between, so it gets a path of the
    descriptor.
    """
    return safe_open(f"/dev/fd/{file.fileno()}", framework="pt")


def check_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return `tensor`, which was read from the file `path`. Raises SavedNumericsError if it holds NaN or infinity."""
    # The extremes of a tensor with NaN are NaN. They take a tenth of the time of `isfinite().all()`, which copies.
    if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
        raise SavedNumericsError(f"{path}: {name}: holds NaN or infinity", "take a checkpoint from before it diverged")
    return tensor


@final
class LazyTensors(Mapping[str, Tensor]):
    """Tensors in files. Each access reads a tensor into new memory on the CPU; nothing is cached.

    Every access raises SavedNumericsError if what it reads holds NaN or infinity.

    The files may be removed meanwhile: a descriptor of each is open as long as this object exists.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        """`paths` gives the file of each tensor name."""
        self._paths = paths
        self._files: dict[Path, BinaryIO] = {}
        for path in {*paths.values()}:
            self._files[path] = open_regular(path, follow_links=False)
            weakref.finalize(self, self._files[path].close)
        self._open: tuple[Path, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file(name).get_tensor(name)
        return check_finite(tensor.clone(), name, self._paths[name])

    def read_slice(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Return `tensor[index]` of the tensor called `name`, without reading the rest of it."""
        if not index:
            return self[name]
        tensor: Tensor = self._file(name).get_slice(name)[index]
        return check_finite(tensor.clone(), name, self._paths[name])

    def _file(self, name: str) -> Any:
        """Return the `safe_open` of a tensor's file. The last one that was asked for stays open."""
        path = self._paths[name]
        if self._open is None or self._open[0] != path:
            self._open = path, open_tensors(self._files[path])
        return self._open[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def group_by_bytes(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors, in order, in shards of at most `max_bytes`. A larger tensor is a shard of its own."""
    shard: dict[str, Tensor] = {}
    remaining = max_bytes
    for name, tensor in tensors.items():
        size = num_bytes([tensor])
        if shard and size > remaining:
            yield shard
            shard, remaining = {}, max_bytes
        shard[name] = tensor
        remaining -= size
    if shard:
        yield shard
