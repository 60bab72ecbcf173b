"""What all sections of the benchmark share: sizes, a clock, the device of a job."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec

Job = dict[str, Any]
"""What a process has to do, as JSON: `section`, `who`, `device`, `threads`, `precision` and the section's own keys."""


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
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sizes_of(job: Job) -> Sizes:
    return SIZES[job.get("shape", "base")]


def spec_of(job: Job, **changes: Any) -> ModelSpec:
    """Return the model of a job: its sizes, experts, layers and dropout, with `changes`."""
    sizes = sizes_of(job)
    keys = {
        "d_model": sizes.d_model,
        "d_ff": sizes.d_ff,
        "num_heads": sizes.heads,
        "num_layers": job.get("layers", 4),
        "vocab_size": sizes.vocabulary,
        "num_experts": job["experts"],
        "dropout": job.get("dropout", 0.1),
    }
    return ModelSpec(**{**keys, **changes})


def random_batch(rows: int, source: int, target: int, vocabulary: int) -> Batch:
    """Return a batch without padding in the host's memory. It is the same at each call."""
    generator = torch.Generator().manual_seed(1)
    return Batch(*(torch.randint(2, vocabulary, (rows, length), generator=generator) for length in (source, target)))


def batch_of(job: Job) -> Batch:
    sizes = sizes_of(job)
    return random_batch(sizes.batch, sizes.source, sizes.target, sizes.vocabulary)


class Clock:
    """Seconds of a call, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __call__(self, call: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - started


def plain(job: Job) -> torch.device:
    """Set the job's threads and seed, and nothing of this project; return its device."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    cuda = job["device"] == "cuda" or (job["device"] == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def begin(job: Job) -> DistributedContext:
    """Set up the job's device, threads and seed as a run of this project does."""
    plain(job)
    context = DistributedContext(job["device"], "float32" if job["precision"] == "float32" else "selective")
    torch.set_num_threads(job["threads"])  # whatever the limit of this container is
    return context
