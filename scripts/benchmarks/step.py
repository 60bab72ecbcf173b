"""A whole training step against transformers' SwitchTransformers and T5 of the same shape, and its peak memory.

Dropout, jitter, the balance loss, the gradient's norm and the optimizer included. No token is dropped on either side,
so that the work is equal.
"""

from collections.abc import Callable

import torch
from contestants import Contestant, prepare
from machine import Job, batch_of, sizes_of, spec_of
from models import their_model, their_step, without_values
from peers import implementations

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import StopRequest
from switchcli.training.config import TrainSpec
from switchcli.training.loop import fit
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor, AdamW
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState


def step_against_others(job: Job) -> Contestant:
    """Return a contestant whose turn is one training step."""
    device, context = prepare(job)
    spec = spec_of(job, router=SwitchRouter(capacity_factor="dropless", group_sequences=1))
    if job["who"] == "transformers":
        model = their_model(spec, implementations(job)).to(device).train()
        turn = theirs(job, model)
    else:
        assert context is not None, "ours has our allocator"
        model = without_values(spec, device)
        initialize(model, 0)
        turn = ours(job, model, context)
    return Contestant(turn, {"parameters": sum(parameter.numel() for parameter in model.parameters())})


class OneBatch(BatchSource):
    """Source that returns an equal batch in every step."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def batch(self, step: int, first: int, count: int) -> Batch:
        return batch_of(self.job)


def ours(job: Job, model: SwitchTransformer, context: DistributedContext) -> Callable[[], None]:
    """Return the training loop, asked for one more step each time."""
    sizes, state = sizes_of(job), TrainState()
    if job.get("compile"):
        context.compile(model)
    optimizer = {"adafactor": Adafactor(), "adamw": AdamW()}[job["optimizer"]].build(dict(model.named_parameters()))
    wrapped, stop = context.wrap(model), StopRequest()

    def one() -> None:
        fit(
            state,
            wrapped,
            cross_entropy,
            Microbatches(OneBatch(job), sizes.batch, sizes.batch, 0, 1),
            optimizer,
            InverseSquareRoot(learning_rate=1e-3),
            context,
            [],
            TrainSpec(steps=state.step + 1, batch_tokens=sizes.batch * sizes.source),
            stop,
        )

    return one


def theirs(job: Job, model: torch.nn.Module) -> Callable[[], None]:
    """Return transformers' step with its own Adafactor, or with torch's fused AdamW."""
    import transformers

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:  # saturated by its own initialization: a router must not make the work uneven
                parameter.mul_(0.01)
    parameters = list(model.parameters())
    if job["optimizer"] == "adafactor":
        optimizer = transformers.Adafactor(parameters, lr=1e-3, scale_parameter=True, relative_step=False)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    if job.get("compile"):
        model.compile()
    device = parameters[0].device
    batch = Batch(*(ids.to(device) for ids in batch_of(job)))
    step = their_step(model, optimizer, job["precision"] == "bfloat16")
    return lambda: step(batch)
