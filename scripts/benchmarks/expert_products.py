"""The products of large stacks of experts on a CPU, forward and backward, against the six products of each alone."""

import time
from collections.abc import Callable

import torch
from layer import products_alone
from machine import D_FF, D_MODEL, PRECISIONS, TOKENS, Clock, Job, Result, begin, shape

from switchcli.model.moe import experts
from switchcli.model.moe.experts import Experts, grouped_product
from switchcli.model.moe.router import SwitchRouter

ALL_AT_ONCE = 2**62


def expert_products(job: Job) -> Result:
    """Processor seconds of a step of `microbatches`, in which each expert has as many of the 4,096 tokens."""
    context, _ = begin(job)
    clock = Clock(context.device, time.process_time)
    dtype, E, microbatches = PRECISIONS[job["precision"]], job["experts"], job["microbatches"]
    layer = Experts(shape(E, dropout=0.0, router=SwitchRouter()), D_MODEL)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.01)
    x_AD = torch.randn(TOKENS, D_MODEL).to(dtype).requires_grad_()
    gradient_AD = torch.randn(TOKENS, D_MODEL).to(dtype)
    end_E = torch.arange(TOKENS // E, TOKENS + 1, TOKENS // E, dtype=torch.int32)

    def step(cache: int, adds_to_grad: bool) -> Callable[[], None]:
        def call() -> None:
            experts.CPU_CACHE = cache
            for tensor in (x_AD, *layer.parameters()):
                tensor.grad = None
            for _ in range(microbatches):
                hidden_AF = grouped_product(x_AD, layer.wi, end_E, adds_to_grad).relu()
                grouped_product(hidden_AF, layer.wo, end_E, adds_to_grad).backward(gradient_AD)

        return call

    alone = products_alone(layer, dtype)
    cast_FD = torch.empty(D_FF, D_MODEL, dtype=dtype)
    sum_EFD = torch.zeros_like(layer.wi)

    def casts() -> None:
        for _ in range(4 * microbatches):  # two stacks, in two passes
            for weight_FD in layer.wi.detach():
                cast_FD.copy_(weight_FD)

    def gradients() -> None:
        for number in range(2 * microbatches):  # two stacks
            for sum_FD in sum_EFD:
                sum_FD.copy_(cast_FD) if number < 2 else sum_FD.add_(cast_FD)

    ways = {
        "all at once": step(ALL_AT_ONCE, False),
        "one expert at a time, autograd adds": step(0, False),
        "one expert at a time": step(0, True),
        "its casts alone": casts,
        "its gradients alone": gradients,
        "the six products alone": lambda: [alone() for _ in range(microbatches)],
    }
    return {"seconds": clock.in_turn(ways, job["rounds"]), "weights": 2 * layer.wi.numel()}
