"""Optimizers on stacked experts: this project's Adafactor against transformers' and torch's fused AdamW."""

import torch
from machine import D_FF, D_MODEL, Job, Result, begin

from switchcli.training.optimizer_specs import Adafactor, AdamW

EXPERTS = 64


def optimizer(job: Job) -> Result:
    """Seconds of an update of one weight [64, 2048, 768] in float32, and of the norm of its gradient."""
    import transformers

    context, clock = begin(job)
    weight = torch.nn.Parameter(0.02 * torch.randn(EXPERTS, D_FF, D_MODEL, device=context.device))
    weight.grad = 0.001 * torch.randn_like(weight)
    named = {"layer.experts.wi": weight}
    ours, adamw = Adafactor().build(named), AdamW().build(named)
    theirs = transformers.Adafactor([weight], lr=1e-3, scale_parameter=True, relative_step=False)
    calls = {
        "Adafactor": lambda: ours.step(1e-3),
        "transformers' Adafactor": theirs.step,
        "torch's fused AdamW": lambda: adamw.step(1e-3),
        "the gradient's norm": lambda: torch.nn.utils.get_total_norm([weight.grad]),
    }
    return {"seconds": clock.in_turn(calls, job["rounds"]), "parameters": weight.numel()}
