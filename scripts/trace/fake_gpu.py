"""A CUDA device whose tensors have shapes, dtypes and devices, and no values: torch's FakeTensorMode.

Some calls of a run cannot work without values or without a device. `REPLACED` lists them; everything else that a traced
step does is the code of the package.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from switchcli.distributed.context import DistributedContext, HostCopy


class Replaced(NamedTuple):
    """A call that a trace replaces."""

    call: str
    instead: str
    reason: str


REPLACED = (
    Replaced(
        "`nn.Module.to_empty`",
        "new parameters and buffers of the same shapes",
        "torch swaps tensors in place, which fails for fake ones",
    ),
    Replaced(
        "`DistributedContext.to_device`",
        "a batch becomes fake, then it is copied by the same call",
        "batches are made of real numbers in the host's memory",
    ),
    Replaced("`HostCopy.__float__`", "1.0", "the gradient norm has no value: a run waits here for the step before"),
    Replaced("a scalar of a tensor in the host's memory", "1", "counters of the host have no values either"),
    Replaced("the loader's threads and pinned memory", "a list of microbatches", "fake tensors cannot be pinned"),
    Replaced("the end of answers in generation", "never", "whether all answers have ended depends on values"),
    Replaced("initial weights and checkpoints", "none are loaded", "fake weights have no values"),
    Replaced("DistributedDataParallel, NCCL", "not used", "they call the driver; ranks are traced with other means"),
    Replaced(
        "`HostGroup.sum` and `from_main`, on ranks",
        "the rank's own values, as many times as there are ranks",
        "a group that sends nothing returns nothing",
    ),
    Replaced("a device mesh", "is made outside of fake mode", "it holds the numbers of its ranks, which must be real"),
    Replaced("inductor's constant folding", "off", "it runs kernels while it compiles"),
    Replaced(
        "the compiled graph",
        "runs eagerly on fake tensors, after its kernels are compiled",
        "a kernel cannot be launched",
    ),
)
"""All of them; docs/concepts/gpu-trace.md has this table, which a test compares."""


def _to_empty(module: nn.Module, *, device: torch.device) -> nn.Module:
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=device)
    return module


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Make all tensors of this block fake, and replace the calls of `REPLACED`."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    to_device = DistributedContext.to_device

    def fake_batch(context: DistributedContext, batch: Any) -> Any:
        return to_device(context, type(batch)(*(mode.from_tensor(tensor) for tensor in batch)))

    with ExitStack() as replaced:
        replaced.enter_context(patch.object(nn.Module, "to_empty", _to_empty))
        replaced.enter_context(patch.object(DistributedContext, "to_device", fake_batch))
        replaced.enter_context(patch.object(HostCopy, "__float__", lambda copy: 1.0))
        replaced.enter_context(mode)
        yield
