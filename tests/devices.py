"""Devices for tests that compare a device with the CPU.

Rows for `cuda` run under `pytest -m gpu`. Rows for `cpu` belong to the ordinary suite: there the CPU is compared with
itself, so that the code of the test is known to work on machines without a GPU.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

NEEDS_CUDA = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ("cpu", pytest.param("cuda", marks=NEEDS_CUDA))


def on_devices(cases: Iterable[Any], on_cpu: Iterable[Any] | None = None) -> list[Any]:
    """Return parameter rows (device, case): every case on CUDA; on the CPU those in `on_cpu`, or all of them."""
    cases = list(cases)
    chosen = cases if on_cpu is None else list(on_cpu)
    assert all(case in cases for case in chosen)
    cpu = [pytest.param("cpu", case, id=f"cpu-{case}") for case in chosen]
    return cpu + [pytest.param("cuda", case, id=f"cuda-{case}", marks=NEEDS_CUDA) for case in cases]
