"""Known devices by name: their memory and their rates. Nothing here imports torch, because completion reads the names.

`GPUS` has what the data sheets of the manufacturers say: FLOP/s of dense matrix products, without sparsity, and with
sums in float32. The memory is the total that nvidia-smi (or rocm-smi) shows, which is less than the name of the device
says.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from switchcli.errors import RecipeError

RESERVED_FRACTION: Final = 0.1
"""Fraction of a device's memory that a plan leaves free. The count of bytes leaves out the context of CUDA (about half
a GiB), buffers of NCCL, workspaces of kernels and the fragmentation of PyTorch's allocator. The fraction is an
assumption: it was not measured on a GPU."""
UTILIZATION: Final = 0.4
"""Fraction of a data sheet's FLOP/s that a training step is assumed to reach in its matrix products. It is an
assumption: no step was measured on a GPU."""


class Gpu(NamedTuple):
    """The memory and the rates of a device. The rates are those of the data sheet, which no program reaches."""

    memory_mib: int
    """Total memory in MiB."""
    flops: float
    """FLOP/s of products in bfloat16."""
    float32_flops: float
    """FLOP/s of products in float32, without TF32, which switchcli leaves off."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * 2**20


# fmt: off
GPUS: Final[Mapping[str, Gpu]] = MappingProxyType({
    #                MiB      bfloat16   float32
    "a100-40gb": Gpu(40_960,  312e12,    19.5e12),  # SXM
    "a100-80gb": Gpu(81_920,  312e12,    19.5e12),  # SXM
    "h100":      Gpu(81_559,  989e12,    67e12),  # SXM, 80 GB
    "h200":      Gpu(143_771, 989e12,    67e12),  # SXM
    "b200":      Gpu(183_359, 2_250e12,  75e12),  # in HGX, 180 GB
    "l4":        Gpu(23_034,  121e12,    30.3e12),
    "l40s":      Gpu(46_068,  362e12,    91.6e12),
    "a10g":      Gpu(23_028,  70e12,     35e12),   # not the A10, which has other rates
    "rtx-3090":  Gpu(24_576,  71e12,     35.6e12),
    "rtx-4090":  Gpu(24_564,  165e12,    82.6e12),
    "rtx-5090":  Gpu(32_607,  209e12,    104.8e12),
    # SXM2. It has no products in bfloat16, only in float16, which switchcli does not use: the rate is that of float32.
    "v100-32gb": Gpu(32_768,  15.7e12,   15.7e12),
    "mi300x":    Gpu(196_592, 1_307e12,  163.4e12),
})
# fmt: on


def find(name: str) -> Gpu:
    """Return the device with a name of `GPUS`, in any case.

    Raises:
        RecipeError: there is none; the message has the nearest name and the list.
    """
    if gpu := GPUS.get(name.lower()):
        return gpu
    # `a100` is the start of two names, and as near to `h100` as to them.
    starting = [known for known in GPUS if known.startswith(name.lower())]
    close = starting or difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise RecipeError(
        f"--gpu ({name!r}): no such device. {hint}The devices are {', '.join(GPUS)}; give --memory for another"
    )
