"""What `train.activation_checkpointing: blocks` costs: steps with and without it in turn, and the peak of both."""

import resource
import time
from collections.abc import Callable

from machine import Clock, Job, Result, batch, begin
from step import our_model

from switchcli.distributed.context import DistributedContext
from switchcli.model.block_execution import recompute_blocks
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens
from switchcli.training.optimizer_specs import Adafactor


def recompute(job: Job) -> Result:
    """Seconds of steps of each of `what` in turn, and the most memory that the process has had beyond its imports.

    On a CPU those of its own threads: steps are long, and what else a machine does falls on one or the other.
    """
    context, clock = begin(job)
    if context.device.type == "cpu":
        clock = Clock(context.device, time.process_time)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls = {what: a_step(job, context, what) for what in job["what"]}
    seconds = clock.in_turn(calls, job["rounds"])
    return {"seconds": seconds, "peak": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def a_step(job: Job, context: DistributedContext, what: str) -> Callable[[], None]:
    """Forward, backward and Adafactor."""
    model = our_model(job, context.device)
    if what == "blocks":
        recompute_blocks(model)
    optimizer = Adafactor().build(dict(model.named_parameters()))

    def call() -> None:
        here = batch()
        real = RealTokens.of(here)
        accumulate_gradients(model, cross_entropy, [Microbatch(0, here, real)], real, context, "")
        optimizer.step(1e-3)
        model.zero_grad()

    return call
