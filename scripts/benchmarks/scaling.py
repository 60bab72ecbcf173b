"""Weak scaling: experts that grow with the ranks, as many tokens on each of them; what the collectives take.

Every rank is a process with a share of the machine's threads. The planner's estimate is given the rate of the products
on one rank and the bandwidth of an all-to-all by itself, both measured here.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from machine import BATCH, SOURCE, TARGET, Clock, Job, Result, batch, plain, shape

from switchcli.distributed.context import DistributedContext
from switchcli.distributed.parallel_spec import ParallelSpec
from switchcli.model.config import ModelSpec
from switchcli.model.init import initial_weights
from switchcli.model.transformer import SwitchTransformer
from switchcli.planner.plan import Machine, flops_of, model_axes, plan
from switchcli.planner.step import Mesh, Step, rank_weights
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens
from switchcli.training.optimizer_specs import Adafactor

EXPERTS_A_RANK = 4
MESSAGE = 2**22
"""float32 elements of the all-to-all that is timed by itself: 16 MiB, about a layer's."""


def scaling(job: Job) -> Result:
    """Seconds of steps, of their all-to-alls and of the sum of the gradients, on the main rank."""
    plain(job)
    context = DistributedContext(job["device"], "float32", ParallelSpec(expert=job["ranks"]))
    spec, clock = _spec(job), Clock(context.device)
    with torch.device("meta"):
        model = SwitchTransformer(spec)
    weights = context.parallelize(model)
    weights.load_full(initial_weights(spec, 0, weights.experts))
    wrapped, optimizer = context.wrap(model.train()), Adafactor().build(weights.parameters, weights.layouts)
    here = context.to_device(batch())
    taken = {"all-to-all": 0.0}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any, **named: Any) -> Any:
            before = time.perf_counter()
            result = call(*arguments, **named)
            taken["all-to-all"] += time.perf_counter() - before
            return result

        return timing

    def step() -> None:
        own = RealTokens.of(here)
        real = RealTokens(own.inputs * context.world, own.targets * context.world)
        accumulate_gradients(wrapped, cross_entropy, [Microbatch(0, here, own)], real, context, "0")
        optimizer.step(1e-3)
        optimizer.zero_grad()

    def apart() -> None:
        with context.synchronize_gradients(wrapped, 1, 2):
            cross_entropy(wrapped, here).target_sum.backward()
        optimizer.step(1e-3)
        optimizer.zero_grad()

    clock(step)
    dist.all_to_all_single = timed(dist.all_to_all_single)
    seconds: dict[str, list[float]] = {"step": [], "all-to-all": [], "without the sum of gradients": []}
    for _ in range(job["rounds"]):
        taken["all-to-all"] = 0.0
        seconds["step"].append(clock(step))
        seconds["all-to-all"].append(taken["all-to-all"])
        seconds["without the sum of gradients"].append(clock(apart))
    return {"seconds": seconds, "bytes_per_second": _bandwidth(context, clock)}


def estimate(job: Job, one_rank: float, bytes_per_second: float) -> float:
    """The planner's seconds of a step on the job's ranks, from those of a step on one and the bandwidth."""
    spec, ranks = _spec(job), job["ranks"]
    with torch.device("meta"):
        weights = dict(SwitchTransformer(spec).named_parameters())
    own = {model: rank_weights(weights, {}, model) for model in model_axes(spec, ranks)}
    alone = _spec({**job, "ranks": 1})
    rate = flops_of(alone, Step(BATCH, SOURCE, TARGET, product_bytes=4, fused=False), Mesh(1), BATCH) / one_rank
    machine = Machine(ranks, 2**50, rate, 1e15, bytes_per_second, bytes_per_second)
    step = Step(BATCH * ranks, SOURCE, TARGET, product_bytes=4, fused=False)
    fits = plan(spec, step, machine, BATCH, own).fits
    return next(fit.step_seconds for fit in fits if fit.mesh == Mesh(ranks, ranks))


def _spec(job: Job) -> ModelSpec:
    return shape(EXPERTS_A_RANK * job["ranks"], num_layers=2)


def _bandwidth(context: DistributedContext, clock: Clock) -> float:
    """Bytes that leave a rank in a second."""
    if context.world == 1:
        return 0.0
    sent, received = (torch.ones(MESSAGE, device=context.device) for _ in range(2))
    dist.all_to_all_single(received, sent)
    seconds = min(clock(lambda: dist.all_to_all_single(received, sent)) for _ in range(5))
    return 4 * MESSAGE * (context.world - 1) / context.world / seconds
