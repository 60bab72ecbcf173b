"""Steps of the models that Tables 1, 2 and 10 compare, in turn: what each costs, forward, backward and Adafactor."""

import time
from collections.abc import Callable

import torch
from machine import BATCH, Clock, Job, Result, batch, plain, shape

from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import NoTokenLeftBehindRouter, RouterSpec, SwitchRouter, TopKRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens
from switchcli.training.optimizer_specs import Adafactor

EXPERTS = 32


def sparse(router: RouterSpec, **changes: object) -> ModelSpec:
    return shape(EXPERTS, num_layers=2, dropout=0.0, router=router, **changes)


def contestants() -> dict[str, ModelSpec]:
    whole = {"group_sequences": BATCH}
    factors = (2.0, 1.25, 1.0)
    return {
        "dense": shape(1, num_layers=2, dropout=0.0),
        "dense-large": shape(1, num_layers=4, dropout=0.0, d_model=1024, d_ff=2816, num_heads=16),
        **{f"switch-{factor}": sparse(SwitchRouter(capacity_factor=factor, **whole)) for factor in factors},
        **{f"moe-{factor}": sparse(TopKRouter(capacity_factor=factor, **whole)) for factor in factors},
        "next-1.0": sparse(NoTokenLeftBehindRouter(capacity_factor=1.0, **whole)),
        "attention-1.25": sparse(SwitchRouter(**whole), sparse="attention"),
        "both-1.25": sparse(SwitchRouter(**whole), sparse="both"),
        "argmax": sparse(SwitchRouter(jitter=0.0, **whole)),
        "sample": sparse(SwitchRouter(jitter=0.0, sample_temperature=1.0, **whole)),
        "input-dropout": sparse(SwitchRouter(jitter=0.0, input_dropout=0.1, **whole)),
    }


def paper(job: Job) -> Result:
    """Seconds of steps of each of `what`, and of a CPU's those of its own threads: others may use it as well."""
    device = plain(job)
    context = DistributedContext(job["device"], job["precision"])
    clock = Clock(device, time.perf_counter if device.type == "cuda" else time.process_time)
    specs = contestants()
    router_dtype = torch.bfloat16 if job["precision"] == "bfloat16" else torch.float32
    calls = {what: a_step(specs[what], context, router_dtype) for what in job["what"]}
    return {"seconds": clock.in_turn(calls, job["rounds"])}


def a_step(spec: ModelSpec, context: DistributedContext, router_dtype: torch.dtype) -> Callable[[], None]:
    with torch.device("meta"):
        model = SwitchTransformer(spec, router_dtype)
    model = model.to_empty(device=context.device).train()
    initialize(model, 0)
    optimizer = Adafactor().build(dict(model.named_parameters()))
    here = batch()
    real = RealTokens.of(here)

    def call() -> None:
        accumulate_gradients(model, cross_entropy, [Microbatch(0, here, real)], real, context, "")
        optimizer.step(1e-3)
        model.zero_grad()

    return call
