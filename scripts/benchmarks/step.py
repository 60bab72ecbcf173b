"""A whole training step against transformers' SwitchTransformers and T5 of the same shape, and its peak memory.

Dropout, jitter, the balance loss, the gradient's norm and the optimizer included. No token is dropped on either side,
so that the work is equal.
"""

from collections.abc import Callable

import torch
from contestants import Contestant, prepare, sizes_of
from machine import Job, batch, shape
from peers import their_model
from torch import nn

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.system.signals import StopRequest
from switchcli.training.config import TrainSpec
from switchcli.training.loop import fit
from switchcli.training.loss import FixedLoss, cross_entropy
from switchcli.training.microbatches import Microbatches
from switchcli.training.optimizer_specs import Adafactor, AdamW
from switchcli.training.schedules import InverseSquareRoot
from switchcli.training.state import TrainState


def step_against_others(job: Job) -> Contestant:
    """One training step a turn."""
    device, _, context = prepare(job)
    if job["who"] == "transformers":
        model = their_model(job, sizes_of(job), job["layers"]).to(device).train()
        turn = their_step(job, model, device)
    else:
        assert context is not None, "ours has our allocator"
        model = our_model(job, device)
        turn = our_step(job, model, context)
    return Contestant(turn, {"parameters": sum(parameter.numel() for parameter in model.parameters())})


class OneBatch(BatchSource):
    """Source that returns an equal batch in every step."""

    def __init__(self, job: Job) -> None:
        self.sizes = sizes_of(job)

    def batch(self, step: int, first: int, count: int) -> Batch:
        return batch(sizes=self.sizes)


def our_step(job: Job, model: SwitchTransformer, context: DistributedContext) -> Callable[[], None]:
    """The training loop, asked for one more step each time."""
    sizes, state = sizes_of(job), TrainState()
    if job.get("compile"):
        context.compile(model)
    optimizer = {"adafactor": Adafactor(), "adamw": AdamW()}[job["optimizer"]].build(dict(model.named_parameters()))
    wrapped, stop = context.wrap(model), StopRequest()

    def one() -> None:
        fit(
            state,
            wrapped,
            FixedLoss(cross_entropy),
            Microbatches(OneBatch(job), sizes.batch, None, 1, 0, 1),
            optimizer,
            InverseSquareRoot(learning_rate=1e-3),
            context,
            [],
            TrainSpec(steps=state.step + 1, batch_tokens=sizes.batch * sizes.source),
            stop,
        )

    return one


def our_model(job: Job, device: torch.device) -> SwitchTransformer:
    router, dropout = SwitchRouter(capacity_factor="dropless", group_sequences=1), job.get("dropout", 0.1)
    spec = shape(job["experts"], sizes_of(job), num_layers=job["layers"], router=router, dropout=dropout)
    with torch.device("meta"):
        model = SwitchTransformer(spec)
    model = model.to_empty(device=device).train()
    initialize(model, 0)
    return model


def their_step(job: Job, model: nn.Module, device: torch.device) -> Callable[[], None]:
    """transformers' model and Adafactor (or torch's fused AdamW) in the plainest loop, the gradient's norm included."""
    import transformers

    parameters = list(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:  # saturated by its own initialisation: a router must not make the work uneven
                parameter.mul_(0.01)
    if job["optimizer"] == "adafactor":
        optimizer = transformers.Adafactor(parameters, lr=1e-3, scale_parameter=True, relative_step=False)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
    if job.get("compile"):
        model.compile()
    inputs_BS, targets_BT = batch(device, sizes_of(job))
    routed = {"output_router_logits": True} if job["experts"] > 1 else {}

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=job["precision"] == "bfloat16"):
            loss = model(input_ids=inputs_BS, labels=targets_BT, **routed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return one
