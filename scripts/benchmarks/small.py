"""A training step of the quickstart's model, and the matrix products in it alone."""

from collections.abc import Callable
from typing import Any

import torch
from machine import Job, Result, begin
from torch.utils._python_dispatch import TorchDispatchMode

from switchcli.data.batch import Batch
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loss import cross_entropy
from switchcli.training.optimizer_specs import Adafactor

ROWS, SOURCE, TARGET = 64, 128, 29
SPEC = ModelSpec(
    vocab_size=1024,
    d_model=64,
    d_ff=256,
    num_heads=4,
    num_layers=2,
    num_experts=8,
    sparse_every=1,
    router=SwitchRouter(group_sequences=16),
)
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "mv", "_grouped_mm", "_linear_pointwise")


class Recorder(TorchDispatchMode):
    """Keeps the operations of a step: their number, and the products with their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.products: list[Callable[[], object]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if op.overloadpacket.__name__ in PRODUCTS:
            self.products.append(lambda: op(*args, **(kwargs or {})))
        return op(*args, **(kwargs or {}))


def small(job: Job) -> Result:
    """Seconds of a step (forward, backward, optimizer), of its parts, and of its products alone."""
    context, clock = begin(job)
    model = SwitchTransformer(SPEC)
    initialize(model, 0)
    model.train()
    optimizer = Adafactor().build(dict(model.named_parameters()))
    batch = Batch(*(torch.randint(2, SPEC.vocab_size, (ROWS, length)) for length in (SOURCE, TARGET)))

    def loss() -> torch.Tensor:
        torch.manual_seed(0)
        with context.autocast():
            found = cross_entropy(model, batch)
        assert found.auxiliary is not None
        return found.target_sum / batch.targets_BT.numel() + found.auxiliary.mean()

    def step() -> None:
        loss().backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()

    def gradients() -> None:
        loss().backward()
        optimizer.zero_grad()

    step()
    with Recorder() as recorder:
        step()

    def products() -> None:
        with torch.no_grad():
            for product in recorder.products:
                product()

    calls = {"step": step, "forward": loss, "forward and backward": gradients, "products alone": products}
    return {"seconds": clock.in_turn(calls, job["rounds"]), "operations": recorder.count, "tokens": ROWS * SOURCE}
