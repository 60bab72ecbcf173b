"""Matrix products on a CPU: by torch's usual library, by oneDNN, and packed (`model/kernels/cpu_products.py`)."""

from collections.abc import Callable
from functools import partial

import torch
from machine import PRECISIONS, Clock, Job, Result, plain

from switchcli.model.kernels import cpu_products

SHAPES = {
    "projection, quickstart": (8192, 64, 64),
    "expert, quickstart": (1024, 64, 256),
    "projection, base": (4096, 768, 768),
    "feed-forward, base": (4096, 768, 2048),
    "expert, 64 rows": (64, 768, 2048),
    "expert, 1 row": (1, 768, 2048),
    "vocabulary, 8 rows": (8, 768, 32128),
}
"""Rows, inputs and outputs."""
WAYS = {"usual": False, "oneDNN": True}


def products(job: Job) -> Result:
    """Seconds of x @ weight.T, and of the gradient of the weight, in turn, and the multiplications and additions."""
    clock = Clock(plain(job))
    rows, inputs, outputs = SHAPES[job["row"]]
    dtype = PRECISIONS[job["precision"]]
    shapes = ((rows, inputs), (rows, outputs), (outputs, inputs))
    x_ND, grad_NF, weight_FD = (torch.randn(shape).to(dtype) for shape in shapes)
    times = max(1, 2**28 // (rows * inputs * outputs))
    seconds = {}
    for what, call in {
        "x @ weight.T": lambda: cpu_products.matmul(x_ND, weight_FD.mT),
        "grad.T @ x": lambda: cpu_products.matmul_over_rows(grad_NF, x_ND),
    }.items():
        ways = {way: _by(call, is_onednn, times) for way, is_onednn in WAYS.items()}
        packed = cpu_products.packed_linear(weight_FD, dtype, rows) if what == "x @ weight.T" else None
        if packed is not None:
            ways["packed"] = _by(partial(packed, x_ND), True, times)
        seconds[what] = clock.in_turn(ways, job["rounds"])
    return {"seconds": seconds, "flops": 2 * rows * inputs * outputs * times}


def _by(call: Callable[[], object], is_onednn: bool, times: int) -> Callable[[], None]:
    def calls() -> None:
        cpu_products.onednn_is_faster = lambda: is_onednn  # type: ignore[assignment]
        for _ in range(times):
            call()

    return calls
