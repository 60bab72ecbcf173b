"""oneDNN's products forced, whatever the processor: oneDNN runs on any x86 processor from SSE4.1 on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from switchcli.model.kernels import cpu_products


class Calls(TorchDispatchMode):
    """Records the shape of the first operand of each of oneDNN's products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def is_missing() -> bool:
    """Return whether this torch has no oneDNN, for instance on a processor that is not x86."""
    return not cpu_products._has_operations()


@contextmanager
def forced() -> Iterator[Calls]:
    """Have oneDNN compute all products that are large enough, and record them."""
    with pytest.MonkeyPatch.context() as patch, Calls() as calls:
        patch.setattr(cpu_products, "onednn_is_faster", lambda: True)
        patch.setattr(cpu_products, "has_full_width_avx512", lambda: True)
        yield calls
