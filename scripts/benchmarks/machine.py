"""What all sections of the benchmark share: the shape, a clock, and what the machine can do at most."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec


class Sizes(NamedTuple):
    """Sizes of a model and of its batch."""

    d_model: int
    d_ff: int
    heads: int
    vocabulary: int
    batch: int
    """Sequences in a batch."""
    source: int
    """Tokens of an input."""
    target: int
    """Tokens of a target."""


SIZES = {
    "base": Sizes(768, 2048, 12, 32128, 8, 512, 114),
    "small": Sizes(512, 2048, 8, 32128, 4, 256, 64),
    "tiny": Sizes(32, 64, 4, 128, 2, 16, 8),
}
D_MODEL, D_FF, HEADS, VOCABULARY, BATCH, SOURCE, TARGET = SIZES["base"]
TOKENS = BATCH * SOURCE
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Job = dict[str, Any]
Result = dict[str, Any]


def shape(num_experts: int, sizes: Sizes = SIZES["base"], **changes: Any) -> ModelSpec:
    keys = {
        "d_model": sizes.d_model,
        "d_ff": sizes.d_ff,
        "num_heads": sizes.heads,
        "num_layers": 4,
        "vocab_size": sizes.vocabulary,
        "num_experts": num_experts,
        "dropout": 0.1,
    }
    return ModelSpec(**{**keys, **changes})


class Clock:
    """Seconds of a call, the device's work included."""

    def __init__(self, device: torch.device, timer: Callable[[], float] = time.perf_counter) -> None:
        self._timer = timer
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, call: Callable[[], object]) -> float:
        self._wait()
        started = self._timer()
        call()
        self._wait()
        return self._timer() - started

    def in_turn(self, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Each call once uncounted, then all of them `rounds` times one after the other."""
        for call in calls.values():
            self(call)
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(self(call))
        return found


def plain(job: Job) -> torch.device:
    """The job's device, threads and seed, and nothing of this project's."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    cuda = job["device"] == "cuda" or (job["device"] == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def begin(job: Job) -> tuple[DistributedContext, Clock]:
    plain(job)
    context = DistributedContext(job["device"], "float32" if job["precision"] == "float32" else "selective")
    torch.set_num_threads(job["threads"])  # whatever the limit of this container is
    return context, Clock(context.device)


def bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second of a copy of 256 MB into standing memory, reads and writes counted."""
    source, target = (torch.ones(2**26, device=device) for _ in range(2))
    return 2 * source.numel() * 4 / min(clock(lambda: target.copy_(source)) for _ in range(8))


def ceilings(job: Job) -> Result:
    """Products of an expert's rows with a weight that is read from memory each time, and the copy."""
    context, clock = begin(job)
    dtype, device = PRECISIONS[job["precision"]], context.device
    speed = {}
    for rows in (TOKENS, 512, 128, 32):
        weights = torch.randn(TOKENS // rows, D_FF, D_MODEL, device=device).to(dtype)
        x_AD = torch.randn(rows, D_MODEL, device=device).to(dtype)
        y_AF = torch.empty(rows, D_FF, device=device, dtype=dtype)

        def products(weights: torch.Tensor = weights, x_AD: torch.Tensor = x_AD, y_AF: torch.Tensor = y_AF) -> None:
            for weight_FD in weights:
                torch.mm(x_AD, weight_FD.T, out=y_AF)

        speed[rows] = 2 * TOKENS * D_MODEL * D_FF / min(clock(products) for _ in range(5))
    return {"flops_per_second": speed, "bytes_per_second": bandwidth(device, clock)}


def batch(device: torch.device | None = None, sizes: Sizes = SIZES["base"]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = [
        torch.randint(2, sizes.vocabulary, (sizes.batch, length), generator=generator)
        for length in (sizes.source, sizes.target)
    ]
    return Batch(*(each.to(device) for each in ids))
