"""Faults that are planted into a step: the trace must find each of them, or its silence would mean nothing."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compiled import CASES, compile_case
from ranks import Mesh, first_difference, in_own_process
from steps import Row, trace
from torch import nn

from switchcli.model.moe.layer import RouterWeights
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loss import Objective, StepLoss

ROW = Row("switch-tiny-8", "switch", "selective", "adamw", "none", "train")
Change = Callable[[SwitchTransformer, Objective], Objective]


def _in_the_loss(action: Callable[[torch.Tensor], object]) -> Change:
    """Return a change of the loss that does something with its value."""

    def change(model: SwitchTransformer, objective: Objective) -> Objective:
        def changed(module: nn.Module, batch: Any) -> StepLoss:
            loss = objective(module, batch)
            action(loss.target_sum.detach())
            return loss

        return changed

    return change


def _index_on_the_host(loss: torch.Tensor) -> None:
    loss.new_zeros(4)[torch.tensor([1, 2], device="cpu")]


def _router_in_bfloat16(model: SwitchTransformer, objective: Objective) -> Objective:
    for module in model.modules():
        if isinstance(module, RouterWeights):
            module.dtype = torch.bfloat16
    return objective


def _weight_without_gradient(model: SwitchTransformer, objective: Objective) -> Objective:
    model.register_parameter("unused", nn.Parameter(torch.empty(3, device="cuda")))
    return objective


IN_A_STEP: Mapping[str, tuple[str, Change]] = {
    "`.item()`": ("wait", _in_the_loss(lambda loss: loss.item())),
    "`.cpu()`": ("to host", _in_the_loss(lambda loss: loss.cpu())),
    "an index on the host": ("host and device in one operation", _in_the_loss(_index_on_the_host)),
    "float64": ("float64", _in_the_loss(lambda loss: loss.double())),
    "a router in bfloat16": ("product of bfloat16", _router_in_bfloat16),
    "a parameter without a gradient": ("unused: no gradient", _weight_without_gradient),
}
"""The planted faults, with the word that the trace must say first."""


def planted() -> dict[str, list[str]]:
    """Return what the trace finds of each planted fault: an empty list for one that it overlooks.

    Raises:
        RuntimeError: it finds a fault where none is planted.
    """
    if silent := [*trace(ROW).faults, *compile_case(CASES[0]).faults]:
        raise RuntimeError(f"faults that nobody planted: {silent}")
    mesh = Mesh("switch-tiny-8", 2, ("parallel.expert=2",))
    first, second, whole = in_own_process(mesh, 0), in_own_process(mesh, 1, "omit"), in_own_process(mesh, 1)
    if difference := first_difference(first, whole):
        raise RuntimeError(f"ranks differ: {difference}")
    difference = first_difference(first, second)
    return {
        **{
            name: [one for one in trace(ROW, change).faults if one.startswith(kind)]
            for name, (kind, change) in IN_A_STEP.items()
        },
        "a graph break": [one for one in compile_case(CASES[0], breaks=True).faults if one.startswith("graph break")],
        "a collective that one rank omits": [difference] if difference else [],
    }
